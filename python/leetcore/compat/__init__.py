"""Calls of other libraries, served by leetcore: change the import, keep the code."""
