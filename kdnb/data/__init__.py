"Image sets as `DataLoaders`: from arrays, from folders, by name"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), 'data.arrays', 'data.loaders', 'data.folders', 'data.readers', 'data.sets')
