"""SPHERE: spectral plasticity for Mixture-of-Experts policies in deep reinforcement learning."""
