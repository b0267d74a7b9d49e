"Which channels belong together, which are dead, and the network without them"
from kdnb._face import show_rooms
from kdnb.features.capture import constant_draws

__all__ = show_rooms(globals(), *(f'channels.{o}' for o in 'layers groups trial remove dead shrink learner attention norms'.split()))
