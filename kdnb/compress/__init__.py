"Half of the MACs, 100,000 parameters, 3 milliseconds: say how small, and get the network, trained and measured"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), *(f'compress.{o}' for o in 'budget order cut noise result learner'.split()))
