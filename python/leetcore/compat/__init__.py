"""The calls of other libraries, with one meaning each: change the import, keep the code."""
