from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(interpolation=None)
ini.read_string(Path('settings.ini').read_text(encoding='utf-8'))
cfg = ini['DEFAULT']
sweep,onnx,hub = (cfg[f'{o}_requirements'].split() for o in ('sweep','onnx','hub'))

setup(
    **{o: cfg[o] for o in ('name', 'version', 'description', 'author')},
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    python_requires=f">={cfg['min_python']}",
    classifiers=cfg['classifiers'].strip().splitlines(),
    packages=find_packages(include=['kdnb', 'kdnb.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={'sweep': sweep, 'onnx': onnx, 'hub': hub, 'distributed': cfg['distributed_requirements'].split(),
                    'dev': [*cfg['dev_requirements'].split(), *sweep, *onnx, *hub]},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['kdnb=kdnb._modidx:d']},
)
