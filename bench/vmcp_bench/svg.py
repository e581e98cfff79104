"""Charts as SVG, with the standard library alone: lines, horizontal bars and cumulative distributions.

Axes have labels with units; series have their names beside them; colours are those of Okabe and Ito, which the colour-blind can tell apart, and each
series has a mark of its own besides. A chart is text from to_svg(); nothing here knows what is measured.
"""

import math
from xml.sax.saxutils import escape

from .figures import percentile, significant

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#8C6D1F")
INK, FAINT, GRID = "#222222", "#666666", "#E3E3E3"
FONT = "font-family=\"system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif\""
CHAR = 7.0  # width of a letter at 12 px, about


class Scale:
    """Maps values to places between `start` and `end`; linear, or logarithmic."""

    def __init__(self, values, start, end, log):
        self.start, self.end, self.log = start, end, log
        values = [value for value in values if value is not None and (value > 0 or not log)]
        low, high = (min(values), max(values)) if values else (1, 10)
        if log:
            self.low, self.high = low / 1.3, high * 1.3
            if self.high / self.low < 8:  # not so near that noise looks like a mountain
                middle = math.sqrt(self.low * self.high)
                self.low, self.high = middle / 2.9, middle * 2.9
        else:
            self.low, self.high = min(0, low), high * 1.08 if high > 0 else 1

    def place(self, value):
        if self.log:
            value = max(value, self.low)
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self):
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next(factor for factor in (1, 2, 2.5, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
            first = math.ceil(self.low / step - 1e-9)
            return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = math.log10(self.high / self.low)
        factors = (1,) if decades > 4 else (1, 3) if decades > 2.5 else (1, 2, 5)
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        return [factor * 10.0 ** power for power in range(low, high + 1) for factor in factors if self.low <= factor * 10.0 ** power <= self.high]


def tick_text(value):
    text = f"{value:.10f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else f"{int(value):,}".replace(",", "\u202f") if value >= 10000 and value == int(value) else text


class Drawing:
    """Elements, in the order in which they are painted."""

    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def line(self, x1, y1, x2, y2, colour=FAINT, width=1.0, dash=None):
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashes}/>')

    def path(self, points, colour, width=2.0):
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>')

    def bar(self, x, y, width, height, colour, opacity=1.0):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.5, width):.1f}" height="{height:.1f}" rx="1.5" fill="{colour}" fill-opacity="{opacity}"/>')

    def text(self, x, y, text, size=12, colour=INK, anchor="start", weight="normal", turn=None, halo=False):
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn is not None else ""
        lit = ' stroke="#ffffff" stroke-width="3.5" paint-order="stroke" stroke-linejoin="round"' if halo else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}"{turned}{lit}>'
                          f"{escape(str(text))}</text>")

    def mark(self, x, y, kind, colour):
        r = 4.0
        shapes = {0: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"', 1: f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"',
                  2: f'<path d="M{x:.1f} {y - r - 0.8:.1f} l{r + 0.8} {2 * r:.1f} h{-2 * (r + 0.8):.1f} z"',
                  3: f'<path d="M{x:.1f} {y - r - 1:.1f} l{r + 1} {r + 1} l{-r - 1} {r + 1} l{-r - 1} {-r - 1} z"'}
        self.parts.append(f'{shapes[kind % 4]} fill="{colour}" stroke="#ffffff" stroke-width="1"/>')

    def to_svg(self, title):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}" role="img" {FONT}>\n'
                f"<title>{escape(title)}</title>\n<rect width=\"{self.width}\" height=\"{self.height}\" fill=\"#ffffff\"/>\n" + "\n".join(self.parts) + "\n</svg>\n")


def _heading(drawing, title, subtitle):
    drawing.text(16, 26, title, 15, weight="600")
    if subtitle:
        drawing.text(16, 45, subtitle, 12, FAINT)


def _frame(drawing, box, x_scale, y_scale, x_ticks, x_label, y_label, y_text=tick_text):
    """Grid, ticks and the labels of both axes. `box`: left, top, right, bottom."""
    left, top, right, bottom = box
    for value in y_scale.ticks():
        y = y_scale.place(value)
        drawing.line(left, y, right, y, GRID)
        drawing.text(left - 8, y + 4, y_text(value), 11, FAINT, "end")
    for value, text in x_ticks:
        x = x_scale.place(value)
        drawing.line(x, top, x, bottom, GRID)
        drawing.text(x, bottom + 18, text, 11, FAINT, "middle")
    drawing.line(left, bottom, right, bottom, FAINT)
    drawing.line(left, top, left, bottom, FAINT)
    drawing.text((left + right) / 2, bottom + 40, x_label, 12, INK, "middle")
    drawing.text(20, (top + bottom) / 2, y_label, 12, INK, "middle", turn=-90)


def _apart(places, distance, low, high):
    """Heights for labels near `places`, `distance` apart at least, between low and high."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    result, last = [0.0] * len(places), low - distance
    for index in order:
        result[index] = last = max(places[index], last + distance)
    excess = last - high
    for index in reversed(order):
        if excess <= 0:
            break
        result[index] = min(result[index], high)
        high = result[index] - distance
    return result


def line_chart(title, x_label, y_label, series, *, subtitle="", x_ticks=None, x_log=True, y_log=True, references=()):
    """series: (name, [(x, y, low, high)]); low and high, None or the ends of a thin line. references: (y, text), dashed lines across.

    None if there is nothing to show."""
    series = [(name, [point for point in points if point[1] is not None and (point[1] > 0 or not y_log)]) for name, points in series]
    series = [(name, points) for name, points in series if points]
    if not series:
        return None
    room = max(110, 24 + CHAR * max(len(name) for name, _ in series))
    drawing = Drawing(int(640 + room), 440)
    box = left, top, right, bottom = 74, 64, 640 - 20, 380
    x_scale = Scale([x for _, points in series for x, *_ in points], left + 12, right - 12, x_log)
    y_scale = Scale([value for _, points in series for point in points for value in point[1:]] + [value for value, _ in references], bottom, top, y_log)
    ticks = x_ticks or [(value, tick_text(value)) for value in x_scale.ticks()]
    _heading(drawing, title, subtitle)
    _frame(drawing, box, x_scale, y_scale, ticks, x_label, y_label)
    for value, text in references:
        y = y_scale.place(value)
        drawing.line(left, y, right, y, INK, 1.2, "6 4")
    heights = _apart([y_scale.place(points[-1][1]) for _, points in series], 16, top + 6, bottom - 4)
    for number, ((name, points), height) in enumerate(zip(series, heights)):
        colour = PALETTE[number % len(PALETTE)]
        drawing.path([(x_scale.place(x), y_scale.place(y)) for x, y, *_ in points], colour)
        aside = 3 * (number - (len(series) - 1) / 2)  # so that thin lines at one x do not hide each other
        for x, y, low, high in points:
            if low is not None and high is not None and (low > 0 or not y_log):
                drawing.line(x_scale.place(x) + aside, y_scale.place(low), x_scale.place(x) + aside, y_scale.place(high), colour, 1.2)
        for x, y, *_ in points:
            drawing.mark(x_scale.place(x), y_scale.place(y), number, colour)
        end_x, end_y = x_scale.place(points[-1][0]), y_scale.place(points[-1][1])
        drawing.line(end_x + 6, end_y, right + 6, height, colour, 0.8)
        drawing.text(right + 10, height + 4, name, 12, colour, weight="600")
    for value, text in references:
        drawing.text(left + 22, y_scale.place(value) - 5, text, 11, INK, halo=True)
    return drawing.to_svg(title)


def bar_chart(title, x_label, rows, *, subtitle="", log=True, references=()):
    """rows: (group, label, value, low, high, colour number); a new group gets a heading where it is not "". Values stand beside their bars."""
    rows = [row for row in rows if row[2] is not None and (row[2] > 0 or not log)]
    if not rows:
        return None
    groups = [row[0] for index, row in enumerate(rows) if row[0] and (index == 0 or rows[index - 1][0] != row[0])]
    left = max(90, 26 + CHAR * max([len(row[1]) for row in rows] + [len(group) * 0.6 for group in groups]))
    right, top = left + 520, 66 + (14 if references else 0)
    bottom = top + 24 * len(rows) + 26 * len(groups) + 8
    drawing = Drawing(int(right + 84), int(bottom + 56))
    scale = Scale([value for row in rows for value in row[2:5]] + [value for value, _ in references], left, right, log)
    _heading(drawing, title, subtitle)
    for value in scale.ticks():
        x = scale.place(value)
        drawing.line(x, top, x, bottom, GRID)
        drawing.text(x, bottom + 18, tick_text(value), 11, FAINT, "middle")
    drawing.line(left, bottom, right, bottom, FAINT)
    drawing.text((left + right) / 2, bottom + 40, x_label, 12, INK, "middle")
    y, group_before = top + 6, ""
    for group, label, value, low, high, number in rows:
        if group and group != group_before:
            y += 20
            drawing.text(16, y - 4, group, 12, INK, weight="600", halo=True)
            y += 6
        group_before = group
        colour = PALETTE[number % len(PALETTE)]
        x = scale.place(value)
        drawing.text(left - 8, y + 12, label, 12, INK, "end")
        drawing.bar(left, y, x - left, 16, colour, 0.85)
        far = x
        if low is not None and high is not None:
            far = max(x, scale.place(high))
            drawing.line(scale.place(low), y + 8, scale.place(high), y + 8, INK, 1.2)
            drawing.line(scale.place(high), y + 4, scale.place(high), y + 12, INK, 1.2)
        drawing.text(far + 6, y + 12, significant(value), 11, INK, halo=True)
        y += 24
    for value, text in references:
        x = scale.place(value)
        drawing.line(x, top - 4, x, bottom, INK, 1.2, "6 4")
        drawing.text(x, top - 9, text, 11, INK, "middle", halo=True)
    return drawing.to_svg(title)


def cdf_chart(title, x_label, series, *, subtitle="", log=True, references=()):
    """series: (name, values). Each name stands at its curve, each at another height."""
    series = [(name, sorted(value for value in values if value > 0 or not log)) for name, values in series]
    series = sorted(((name, values) for name, values in series if values), key=lambda one: percentile(one[1], 50))
    if not series:
        return None
    left, top, right, bottom = 74, 64, 700, 380
    drawing = Drawing(880, 440)
    x_scale = Scale([value for _, values in series for value in values] + [value for value, _ in references], left + 6, right - 6, log)
    y_scale = Scale([100], bottom, top, False)
    y_scale.high = 100
    _heading(drawing, title, subtitle)
    _frame(drawing, (left, top, right, bottom), x_scale, y_scale, [(value, tick_text(value)) for value in x_scale.ticks()], x_label,
           "share of the samples, %")
    for value, text in references:
        x = x_scale.place(value)
        drawing.line(x, top, x, bottom, INK, 1.2, "6 4")
        drawing.text(x, top - 6, text, 11, INK, "middle", halo=True)
    for number, (name, values) in enumerate(series):
        colour = PALETTE[number % len(PALETTE)]
        points, before = [(x_scale.place(values[0]), y_scale.place(0))], 0.0
        for rank, value in enumerate(values, 1):
            points.append((x_scale.place(value), y_scale.place(before)))
            before = 100 * rank / len(values)
            points.append((x_scale.place(value), y_scale.place(before)))
        drawing.path(points, colour)
    for number, (name, values) in enumerate(series):
        share = 88 - 76 * number / max(1, len(series) - 1)
        x = x_scale.place(percentile(values, share))
        drawing.text(x + 8, y_scale.place(share) + 4, name, 12, PALETTE[number % len(PALETTE)], weight="600", halo=True)
    return drawing.to_svg(title)
