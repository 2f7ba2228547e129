"""What the site holds beyond the pages in docs/: MkDocs calls the `on_...` functions below.

* Pages that live elsewhere (READMEs of ops and examples, CONTRIBUTING.md, ...) join the site as they are.
* Links are written as the repository's own, so that they work where its files are read; here they become the site's.
* `<!-- settings -->` and the other markers of `_TABLES` are replaced by what the code itself says.

Nothing here imports torch: settings and help texts need the standard library, docstrings are read without running code.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

OPS = {f"internals/ops/{readme.parent.name}.md": readme for readme in sorted(ROOT.glob("heron/ops/*/README.md"))}
PROJECT = {
    f"project/{name.lower()}.md": ROOT / f"{name}.md"
    for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY", "CODE_OF_CONDUCT")
}
EXAMPLES = {f"examples/{readme.parent.name}/index.md": readme for readme in sorted(ROOT.glob("examples/*/README.md"))}
ELSEWHERE = {**OPS, **PROJECT, **EXAMPLES}  # page of the site: its source outside docs/
_PICTURES = {f"examples/{picture.parent.name}/{picture.name}": picture for picture in ROOT.glob("examples/*/*.png")}
_PAGE_OF = {source.relative_to(ROOT).as_posix(): page for page, source in ELSEWHERE.items()}


def on_config(config):
    """Add the pages from elsewhere to the menu."""
    menu = {title: pages for section in config.nav for title, pages in section.items()}
    menu["Internals"].append({"Operators": [{Path(page).stem: page} for page in OPS]})
    menu["Project"].extend(PROJECT)
    menu["Explanation"].extend(EXAMPLES)
    return config


def on_files(files, config):
    """Add the pages from elsewhere to the site."""
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=source.read_text(encoding="utf-8")))
    for place, picture in _PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in the markers, then lead links to where the site has the page."""
    for marker, text in _TABLES.items():
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(text()))
    markdown = re.sub(r"^.*<!-- lines -->.*$", _with_lines, markdown, flags=re.MULTILINE)
    site = page.file.src_uri
    here = posixpath.dirname(ELSEWHERE[site].relative_to(ROOT).as_posix() if site in ELSEWHERE else f"docs/{site}")

    def led(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, link[1]))
        there = _PAGE_OF.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if there is None:
            return link[0]
        return f"]({posixpath.relpath(there, posixpath.dirname(site) or '.')}{link[2] or ''})"

    return re.sub(r"\]\(([\w./-]+)(#[\w-]+)?\)", led, markdown)


def on_page_content(html, page, config, files):
    """Docstrings have Sphinx's roles before names, and `::` before a block; here the name and one colon are enough."""
    return re.sub(r":(?:class|mod|func|meth|attr|exc):(<code)", r"\1", html).replace("::</p>", ":</p>")


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;")


def _settings() -> Iterator[str]:
    """A table for each settings class of heron.config, or group of it: name, type, default and the text of `--help`."""
    import heron.config
    from heron.config.groups import GROUP_OF, GROUPS

    kinds_of_settings = [kind for kind in vars(heron.config).values() if isinstance(kind, type)]
    for kind in reversed([kind for kind in kinds_of_settings if dataclasses.is_dataclass(kind)]):  # the outermost first
        name = kind.__name__
        yield from (f"## {name}", "", kind.__doc__.split("\n\n")[0], "")
        for group in GROUPS if kind is heron.config.TrainConfig else [None]:
            if group:
                yield from (f"### {group.capitalize()}", "")
            yield from ("| setting, type, default | meaning |", "|---|---|")
            for field in dataclasses.fields(kind):
                if group and GROUP_OF.get(field.name) != group:
                    continue
                kinds, optional = heron.config.setting_type(kind, field.name)
                names = " or ".join([kind.__name__ for kind in kinds] + ["none"] * optional)
                default = "none" if field.default is None else _cell(field.default) or '""'
                meaning = _cell(field.metadata.get("doc", ""))
                anchor = f'<span id="{name}.{field.name}"></span>'
                yield f"| {anchor}`{field.name}`<br><small>{names}: {default}</small> | {meaning} |"
            yield ""


def _presets() -> Iterator[str]:
    """Every preset with what it sets."""
    from heron.config import PRESETS

    yield from ("| preset | variant | sizes |", "|---|---|---|")
    for name, values in PRESETS.items():
        sizes = ", ".join(f"{key} {_cell(value)}" for key, value in values.items() if key != "variant")
        yield f"| `{name}` | `{values['variant']}` | {sizes} |"


def _help(*words: str) -> str:
    from heron import cli
    from heron.commands.help_texts import EVERY_FLAG

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*words, "--help", EVERY_FLAG])
    return out.getvalue().rstrip()


def _commands() -> Iterator[str]:
    """The help texts of `heron`, of every verb that it lists, and of every action that a verb lists."""
    os.environ["COLUMNS"] = "100"
    overview = _help()
    yield from ("```text", overview, "```", "")
    for verb in _listed(overview):
        text = _help(verb)
        yield from (f"## heron {verb}", "", "```text", text, "```", "")
        for action in _listed(text):
            yield from (f"### heron {verb} {action}", "", "```text", _help(verb, action), "```", "")


def _listed(text: str) -> list[str]:
    """The verbs, or actions, in a help text."""
    return re.findall(r"^    (\w+)  ", text, re.MULTILINE)


def _imported(file: str) -> dict[str, str]:
    """The names in `__all__` of a package, each with the module that it is imported from or defined in."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    package = ".".join(Path(file).parent.parts)
    origin, public = {}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            origin.update({alias.asname or alias.name: node.module for alias in node.names})
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            public = ast.literal_eval(node.value)
    return {name: origin.get(name, package) for name in public}


def _entry(identifier: str, shown: str) -> Iterator[str]:
    """The directive that mkdocstrings replaces by the docstring of `identifier`, under the name `shown`."""
    yield from (f"::: {identifier}", "    options:", f"      heading: {shown}", f"      toc_label: {shown}", "")


def _names() -> Iterator[str]:
    """The docstring of everything that `import heron` offers by name."""
    import heron

    for name, home in heron._HOMES.items():
        if home != "heron.errors":
            yield from _entry(f"{home}.{name}", f"heron.{name}")


def _generation() -> Iterator[str]:
    import heron

    for name in _imported("heron/generation/__init__.py"):
        if name not in heron._HOMES:
            yield from _entry(f"heron.generation.{name}", f"heron.generation.{name}")


def _ops() -> Iterator[str]:
    for name, home in _imported("heron/ops/__init__.py").items():
        yield from _entry(f"{home}.{name}", f"heron.ops.{name}")


def _with_lines(row: re.Match) -> str:
    """A table row that names files of heron/, with the number of their lines at its marker."""
    names = re.findall(r"`(heron/[\w/.]+\.py)`", row[0])
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in names or _reading_path())
    return row[0].replace("<!-- lines -->", f"{lines:,}")


def _reading_path() -> list[str]:
    """Every file that a row of the reading page names."""
    rows = re.findall(r"^.*<!-- lines -->.*$", (ROOT / "docs/internals/reading.md").read_text("utf-8"), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(heron/[\w/.]+\.py)`", row)]


_TABLES = {
    "<!-- settings -->": _settings,
    "<!-- presets -->": _presets,
    "<!-- commands -->": _commands,
    "<!-- names of heron -->": _names,
    "<!-- names of heron.generation -->": _generation,
    "<!-- names of heron.ops -->": _ops,
}
