"""Models of other libraries with leetcore inside."""
