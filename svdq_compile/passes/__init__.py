"""Graph rewrites. Each pass is one file, reports what it did, and is part of Inductor's cache key."""
