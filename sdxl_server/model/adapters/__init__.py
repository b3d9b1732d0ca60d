"""Adapters (LoRA): low-rank changes of a model's layers, from files in every published naming.

A layer computes W x. With an adapter it computes W x + scale · B (A x). The operator registers adapters. Fused ones are
added to the weights before compilation. Others are named by requests, and the compiled graph takes A and B as inputs.
"""
