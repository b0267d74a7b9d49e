"The command `kdnb`; imports neither torch nor a recipe"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), *(f'cli.{o}' for o in 'values commands command'.split()))
