"What a network costs, what it predicts, and how sparse it may become"
from importlib import import_module
from ..core import evaluating,first_samples,inputs
from ..layers import weighted

__all__ = []
for _room in ('counts','outputs','breakpoint'):
    _room = import_module(f'kdnb.measure.{_room}')
    globals().update({_o: getattr(_room, _o) for _o in _room.__all__})
    __all__ += _room.__all__
