"""The simulated panel: a SimPy discrete-event simulation of the engine, under the same policy stack."""
