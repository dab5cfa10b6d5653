"""From logits to tokens, and from tokens to the end of a request.

params.py      what a caller may ask for, checked
noise.py       the random number of (request, output position, vocabulary entry), in tensor arithmetic
filters.py     top-k, top-p and min-p as one threshold a row
penalties.py   repetition, presence and frequency penalties, with counts kept on the device
batch.py       the requests' sampling state on the host, and one step's worth of it on the device
sampler.py     logits -> token ids, with no host synchronisation
stop.py        whether a sampled token ends its request
"""
