"Every combination of a grid once, on as many processes and machines as there are"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), *(f'sweep.{o}' for o in 'grid storage processes trial worker result'.split()))
