"""CFSP: neurons by coarse and fine activation information."""
