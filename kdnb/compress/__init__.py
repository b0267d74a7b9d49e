"Half of the multiply-accumulates, 100,000 parameters, 3 milliseconds: say how small, and get the network, trained and measured"
from importlib import import_module

__all__ = []
for _room in ('budget','order','cut','noise','result','learner'):
    _room = import_module(f'kdnb.compress.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
