"""Used by every room: files, text, how a model is called, and names of before."""
