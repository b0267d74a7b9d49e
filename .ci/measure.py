"How literate are the notebooks? Figures beside what is wanted, a warning each, never a gate: names are matched, not meaning."
import ast, io, json, re, statistics as st, tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WANTED = {'exported cell: median of lines': '≤ 9', '90 % of cells': '≤ 20', 'longest cell': '≤ 40', 'definitions a cell': '≤ 1.2',
          'public definitions used directly below, %': '≥ 75', 'exported lines before the first result (median)': '≤ 25',
          'longest stretch with nothing shown (median)': '≤ 40', 'words of prose a line': '≥ 3.5', 'pictures and tables a notebook': '≥ 5',
          'largest notebook, exported lines': '≤ 200', 'lines over 100 characters, %': '≤ 6', 'lines over 120 characters': '≤ 10',
          'multiple assignments /100 lines': '≤ 1.5', 'semicolons /100 lines': '≤ .2', 'nested comprehensions /100 lines': '≤ .4',
          'parameters typed, %': '≥ 85', 'parameters documented, %': '≥ 90', 'methods with a docstring, %': '≥ 60'}
COMPREHENSIONS = ast.ListComp,ast.SetComp,ast.DictComp,ast.GeneratorExp

def parse(s):
    try: return ast.parse(s)
    except SyntaxError: return ast.Module([], [])

def lines(s): return [o for o in s.splitlines() if o.strip() and not o.startswith('#|')]
def is_def(o): return isinstance(o, (ast.FunctionDef,ast.ClassDef))
def semicolons(text): return sum(o.type==tokenize.OP and o.string==';' for o in tokenize.generate_tokens(io.StringIO(text).readline))
def imports_only(tree): return all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in tree.body)

def shows(cell, src):
    "Does a cell show or test something?"
    kinds = {o['output_type'] for o in cell.get('outputs', [])}
    return bool(kinds) or 'test_' in src or 'expect_fail' in src

def notebook(path):
    "What is counted of one notebook"
    cells = [(c, ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    r = dict(name=path.stem, size=[], defs=0, public=0, used=0, before=0, longest=0, words=0, shown=0)
    stretch,seen,waiting = 0,False,[]
    for c,s in cells:
        r['shown'] += sum('image/png' in o.get('data', {}) or 'text/html' in o.get('data', {}) for o in c.get('outputs', []))
        if c['cell_type']=='markdown': r['words'] += len(s.split())
        elif re.match(r'#\|\s*exports?\b', s):
            n,tree = len(lines(s)),parse(s)
            stretch += n
            r['before'] += 0 if seen else n
            r['longest'] = max(r['longest'], stretch)
            waiting = [o.name for o in tree.body if is_def(o) and o.name[0]!='_']
            if imports_only(tree): continue
            r['size'].append(n)
            r['defs'] += sum(map(is_def, tree.body))
            r['public'] += len(waiting)
        elif not re.match(r'#\|\s*(hide|default_exp)', s):
            found = [o for o in waiting if re.search(rf'\b{o}\b', s)]
            r['used'] += len(found)
            waiting = [o for o in waiting if o not in found]
            if shows(c, s): seen,stretch = True,0
    return r

def package():
    "What is counted of the modules"
    n = over100 = over120 = multi = semi = nested = args = typed = documented = methods = described = 0
    for path in ROOT.glob('kdnb/**/*.py'):
        if path.name=='_modidx.py': continue
        text = path.read_text(encoding='utf-8')
        rows,tree = text.splitlines(),parse(text)
        n += len(lines(text))
        written = [o for o in rows if not o.startswith('__all__ = ')]      # nbdev's, wrapped for 120 without this beginning
        over100 += sum(len(o)>100 for o in written)
        over120 += sum(len(o)>120 for o in written)
        semi += semicolons(text)      # those of statements: CSS and messages have others
        for o in ast.walk(tree):
            multi += isinstance(o, ast.Assign) and isinstance(o.targets[0], ast.Tuple) and isinstance(o.value, ast.Tuple)
            if isinstance(o, COMPREHENSIONS):
                inner = any(isinstance(x, COMPREHENSIONS) for c in ast.iter_child_nodes(o) for x in ast.walk(c))
                nested += inner or len(o.generators)>1
        for o in tree.body:
            if not is_def(o) or o.name[0]=='_': continue
            for f in [o] if isinstance(o, ast.FunctionDef) else [x for x in o.body if isinstance(x, ast.FunctionDef)]:
                if f is not o and f.name[0]!='_':
                    methods += 1
                    described += bool(ast.get_docstring(f))
                if f.name[0]=='_' and f.name!='__init__': continue
                for a in f.args.args+f.args.kwonlyargs:
                    if a.arg in ('self','cls'): continue
                    args += 1
                    typed += a.annotation is not None
                    documented += '#' in rows[a.lineno-1].split(a.arg, 1)[-1]
    return [100*over100/n, over120, 100*multi/n, 100*semi/n, 100*nested/n, 100*typed/args, 100*documented/args, 100*described/methods]

def figures(rows):
    "The values of `WANTED`, in its order"
    sizes = sorted(n for r in rows for n in r['size'])
    total = lambda k: sum(r[k] for r in rows)
    return [st.median(sizes), sizes[int(.9*len(sizes))], sizes[-1], total('defs')/len(sizes), 100*total('used')/total('public'),
            st.median(r['before'] for r in rows), st.median(r['longest'] for r in rows), total('words')/sum(sizes), total('shown')/len(rows),
            max(sum(r['size']) for r in rows), *package()]

if __name__=='__main__':
    rows = [r for r in map(notebook, sorted((ROOT/'nbs').glob('*.ipynb'))) if r['size']]
    print(f'{"notebook":34}{"lines":>6}{"longest":>8}{"used below":>12}{"before":>8}{"stretch":>8}{"words":>7}{"shown":>6}')
    for r in rows:
        n = sum(r['size'])
        print(f'{r["name"]:34}{n:6}{max(r["size"]):8}{r["used"]:8}/{r["public"]:<3}{r["before"]:8}{r["longest"]:8}{r["words"]/n:7.1f}{r["shown"]:6}')
    print()
    for (k,want),v in zip(WANTED.items(), figures(rows)):
        met = v<=float(want[2:]) if want[0]=='≤' else v>=float(want[2:])
        print(f'{k:50}{v:8.1f}   wanted {want:7}{"" if met else "  warning"}')
