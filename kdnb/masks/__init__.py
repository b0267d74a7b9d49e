"Masks that hold, and what they are put on"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), 'masks.layers', 'masks.model', 'masks.files')
