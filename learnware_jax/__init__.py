"""Specifications of what models were trained for, and a dock that ranks models by them."""
