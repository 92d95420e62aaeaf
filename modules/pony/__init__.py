"""Pony Express: messages and one-sided operations between applications."""
