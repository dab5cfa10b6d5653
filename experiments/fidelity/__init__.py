"""How far the simulated panel is from the real one: `diptych validate`.

matrix       which workloads, loads and policies, and in which order
real_half    runs them in the real panel, and keeps small records
sim_half     replays and simulates those records, and says how far off the simulation was
steps        step times, given the real plans
choices      what a user would decide: capacity, ranking of policies, the cost of believing the simulation
validation   both halves, and the small matrix
tables       all of that as text
"""
