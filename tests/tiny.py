"""A decoder of the tests: small, with grouped heads."""

from learnware_jax.slm.decoder import Config

CONFIG = Config(
    vocabulary=97,
    layers=2,
    width=32,
    feedforward=48,
    heads=4,
    kv_heads=2,
    head_width=8,
    epsilon=1e-6,
    theta=10_000.0,
    positions=64,
)
