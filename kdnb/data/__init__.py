"Image sets as `DataLoaders`: from arrays, from folders, by name"
from importlib import import_module

__all__ = []
for _room in ('arrays','folders','readers','sets'):
    _room = import_module(f'kdnb.data.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
