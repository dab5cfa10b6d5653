"""Rules for which idle cached block goes next."""
