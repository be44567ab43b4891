"""Constructors of log-decays. (Placeholder of the core branch: the module itself is written on its own branch.)"""
