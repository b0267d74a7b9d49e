"The papers' networks by name"
from kdnb._face import show_rooms

__all__ = show_rooms(globals(), *(f'models.{o}' for o in 'registry lenets resnets vggs torchvision named'.split()))
