"""Populations and sweeps on a Ray cluster; Ray is imported where actors are hired, and not before.

plan      who gets what, what becomes of a chunk whose actor died, how results come together: pure functions
pool      the actors: hired, replaced, dismissed
worker    what runs in an actor
desk      what actors ask the driver while they train: whom to prune
engine    `ray(...)`, which hands to a pool what `population` and `sweep` would train here
"""
