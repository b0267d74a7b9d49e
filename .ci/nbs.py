"Run notebooks in a real kernel and keep their outputs, clean; with `--readme` only write README.md from index.ipynb."
import argparse, os, re
from pathlib import Path

import nbformat
from fastcore.nbio import nb2str, read_nb
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT/'nbs/index.ipynb'

def keep(out):
    "Not warnings, progress bars and the blank a finished bar leaves; of fastai's epoch table one form of three"
    html = out.get('data', {}).get('text/html', 'none')
    if 'class="fastprogress"' in html: out.data = {'text/html': html}
    return out.get('name') != 'stderr' and not re.search(r'^\s*$|<progress|<style>\s*progress', html)

def marked(fn, directive):
    "Places of the cells with `directive`, and of those before them that import"
    cells = [o for o in read_nb(fn).cells if o.cell_type == 'code']
    found = [o.idx_ for o in cells if directive in o.directives]
    return {o.idx_ for o in cells if found and o.idx_ < found[0] and 'import *' in o.source and 'export' not in o.directives} | {*found}

def client(nb, fn):
    "What runs the cells of `nb` where `fn` is, in a kernel of this interpreter and no other"
    km = AsyncKernelManager(transport_encryption='auto', kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    return NotebookClient(nb, km=km, coalesce_streams=True, store_widget_state=False, record_timing=False,
                          resources={'metadata': {'path': fn.parent}})

def run(fn, flags, only=None):
    """Run the cells of `fn` that `nbdev-test --flags` would, those of rows and long ones, or those marked with the directive `only`; the others
    keep the outputs they have. Returns what tables say that lack rows, if these need no GPU."""
    skipped = [o for o in get_config().tst_flags.split() if o not in ('rows','long')]
    todo = marked(fn, only) if only else {o.idx_ for o in nb_test_cells(fn, skipped, flags)}
    if todo or not only: print(fn.relative_to(ROOT), '' if todo else 'skipped', flush=True)
    if not todo: return []
    nb = nbformat.read(fn, 4)
    for i,c in enumerate(nb.cells): c.metadata.tags = [] if i in todo else ['skip-execution']
    client(nb, fn).execute(cleanup_kc=True)
    for i in todo: nb.cells[i].outputs = [o for o in nb.cells[i].outputs if keep(o)]
    nbformat.write(nb, fn)
    nbdev_clean.__wrapped__(str(fn))  # the wrapper would parse our command line
    printed = [o for i in todo for t in nb.cells[i].outputs for o in t.get('text', '').splitlines()]
    return [o for o in printed if o.startswith('not run yet') and 'GPU' not in o]

def readme():
    "`INDEX` as markdown that reads well on a git host: no hidden cells or directives, links from the root"
    nb = read_nb(INDEX)
    nb.cells = [c for c in nb.cells if 'hide' not in c.directives]
    nb.metadata = {'language_info': {'name': 'python'}}
    for c in nb.cells:
        if c.cell_type == 'code': c.remove_directives()
        if c.cell_type == 'markdown':
            c.source = re.sub(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)',
                              lambda m: m[1] + os.path.normpath('nbs/' + m[2]), c.source)
    md,res = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(nb), 4))
    if res['outputs']: raise ValueError('index.ipynb draws a picture: save it in nbs/images/ and link it in markdown.')
    md = re.sub(r'<style.*?</style>\s*', '', md, flags=re.DOTALL)
    return re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('notebooks', nargs='*', type=Path, help='default: all in nbs/')
    p.add_argument('--flags', default='', help='cells to run too: "slow"')
    p.add_argument('--only', metavar='DIRECTIVE', help='only cells with this directive, such as rows, and the imports before them')
    p.add_argument('--readme', action='store_true', help='run nothing')
    a = p.parse_args()
    if 'gpu' in (*a.flags.split(), a.only): p.error('GPU cells are run and stored by `make gpu`')
    os.environ['PYTHONPATH'] = str(ROOT)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    fns = [] if a.readme else [o.resolve() for o in a.notebooks or sorted(nbglob(as_path=True))]
    if a.only and not any(marked(fn, a.only) for fn in fns): p.error(f'no cell has the directive {a.only!r}')
    lack = [t for fn in fns for t in run(fn, a.flags.split(), a.only)]
    if a.readme or INDEX in fns and not a.only: (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    if a.only == 'rows' and lack: raise SystemExit('\n'.join(['Tables without rows:', *dict.fromkeys(lack)]))
