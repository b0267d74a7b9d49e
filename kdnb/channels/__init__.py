"Which channels belong together, which are dead, and the network without them"
from importlib import import_module

__all__ = []
for _room in ('layers','groups','trial','dead','shrink','learner'):
    _room = import_module(f'kdnb.channels.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
