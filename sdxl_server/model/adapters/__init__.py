"""Adapters (LoRA and others): changes of a model's layers, from files in every published naming.

A layer computes W x. With a LoRA it computes W x + scale · B (A x). The operator registers adapters. Fused ones are
added to the weights before compilation, in any format. Requests name others, and the compiled graph takes A and B as
inputs.
"""
