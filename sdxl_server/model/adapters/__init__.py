"""Adapters (LoRA): low-rank changes of a model's layers, from files in every naming that they are published in.

A layer computes W x; with an adapter it computes W x + scale · B (A x). The operator registers adapters: they are added
to the weights before anything is compiled, or requests name them and bring A and B to the compiled graph.
"""
