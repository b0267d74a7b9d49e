"What a network costs, what it predicts, and how sparse it may become"
from kdnb._face import show_rooms
from ..core import evaluating,first_samples,inputs
from ..layers import weighted

__all__ = show_rooms(globals(), 'measure.counts', 'measure.outputs', 'measure.breakpoint')
