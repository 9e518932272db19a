"""What a quantised linear computes: number formats, the specification, the operator and its weight."""
