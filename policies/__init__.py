"""Every decision of the serving system, and the control plane that carries one replica's state.

Pure Python and NumPy: nothing here reads a clock, a file, the network or global randomness, so that one policy
object decides the same in the real runtime and in the simulation.
"""
