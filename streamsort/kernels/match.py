"""The compiled loops of template matching: filter, find the best unit, subtract it, look again.

Traces are channel-major here, (n_channels, n_columns), so that the inner loops run along time and are vectorised. A score is summed
in one fixed order whatever the size of the chunk, and columns are decided one after the other, so every bit is a function of the
samples alone. Units and window come as named tuples of arrays (`templates.Templates`, `match.Window`).
"""

from typing import Any

import numpy as np

from streamsort.kernels import Floats, kernel, reduction

Tuple = Any  # a named tuple of arrays; numba reads its fields

_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_LEAST, _MOST = np.float32(0.5), np.float32(1.6)  # amplitude of a spike over its template's: bursts fall to a half

# One spike in the middle of two takes both, and is larger than its unit's are. From this amplitude on it is compared with any two
# together. Were all compared, large ones whose template is a little off would be split: 1 % of the spikes on 64 sites.
_SUM = np.float32(1.2)

# What fits a template but is twice its size, or not much over half of it, is another unit's, known or not.
_TOO_SMALL, _TOO_LARGE = np.float32(0.55), np.float32(2)

STEPS = np.float32(1024)  # of the residual, per noise unit
_LARGEST = np.float32(4096)  # noise units; only artifacts are larger

_SMALL = np.float32(0.49)  # of a template's energy: scores below are asked for by nobody, whatever the rounding
_STRETCH, _LOOK = 64, 32  # columns taken in, and looked at, at once; any numbers give the same spikes

# A spike that leaves something larger than itself, by more than noise is, on so many of its channels is a part of something else.
# Without the margin two spikes at once, as large as one another, would each seem a part of the other, and both be lost.
_CORE, _LARGER_BY = 4, np.float32(4)  # channels, noise units
_HERALD = np.float32(0.6)  # of a rival's height, on that rival's largest channel: it seems to come


@kernel
def advance(
    window: Tuple, t: Tuple, threshold: Floats, traces: Floats, level: Floats, at: tuple[int, int, int], spans: Tuple
) -> tuple[int, int, int]:
    """Take the next samples in, in multiples of `level`, and decide the columns that they complete.

    `at` is up to where the window holds samples, scores and decisions; returned is the same of scores and decisions now, and how
    many spikes were found.
    """
    stop, computed, decided = at
    n_found = 0
    for first in range(0, len(traces), _STRETCH):
        some = traces[first : first + _STRETCH]
        append(window.residual, stop, some, level, window.scratch)
        can_compute = stop + len(some) - t.temporal.shape[2] + spans.n_before + 1
        score(window, t, window.units, stop, computed, can_compute, spans.n_before)
        stop, computed = stop + len(some), can_compute
        n_found = peel(window, t, threshold, decided, computed - spans.sweep - 1, computed, n_found, spans)
        decided = computed - spans.sweep - 1
    return computed, decided, n_found


@kernel
def append(residual: Floats, stop: int, traces: Floats, level: Floats, row: Floats) -> None:
    """Add samples in noise units to what is subtracted from them already, from column `stop` on."""
    n_channels = len(residual)
    for s in range(len(traces)):
        for c in range(n_channels):
            x = min(max(traces[s, c] / level[c], -_LARGEST), _LARGEST)
            row[c] = np.rint(x * STEPS) / STEPS
        for c in range(n_channels):
            residual[c, stop + s] += row[c]


@kernel
def score(window: Tuple, t: Tuple, units: Any, changed: int, start: int, stop: int, n_before: int) -> None:
    """Correlate units' filters, sums of spatial times temporal factors, with the residual at columns [start, stop).

    The residual is the same as last time up to column `changed`. Units end with the first -1.
    """
    end = whole_vectors(changed, stop - n_before + t.temporal.shape[2] - 1)
    for u in units:
        if u < 0:
            break
        lines, scores = window.lines[u], window.scores[u]
        project(window.residual, t.channels[u], t.spatial[u], lines, changed, end)
        for first in range(start, stop, _LOOK):
            last = min(first + _LOOK, stop)
            least = _SMALL * t.energy[u]
            if correlate(lines, t.temporal[u], window.norms[u], least, first, last, n_before, scores, window.scratch):
                window.until[u] = max(window.until[u], mark(scores, _TOO_SMALL * t.energy[u], first - 1, last + 1, window.tall))


@kernel
def project(residual: Floats, channels: Any, spatial: Floats, lines: Floats, start: int, stop: int) -> None:
    """Weigh the channels by each of a unit's spatial factors, at columns [start, stop): most do not change again.

    Three factors and two channels at a time spare loads and stores. Lines beyond the last factor are spare.
    """
    n_ranks, n = len(spatial), 0
    while n < len(channels) and channels[n] >= 0:
        n += 1
    for r in range(0, n_ranks, 3):
        a, b, c = lines[r, start:stop], lines[r + 1, start:stop], lines[r + 2, start:stop]
        a[:], b[:], c[:] = _ZERO, _ZERO, _ZERO
        u, v, w = spatial[r], spatial[min(r + 1, n_ranks - 1)], spatial[min(r + 2, n_ranks - 1)]
        for k in range(0, n, 2):
            m = min(k + 1, n - 1)
            x, y = residual[channels[k], start:stop], residual[channels[m], start:stop]
            u0, v0, w0 = u[k], v[k], w[k]
            u1, v1, w1 = (u[m], v[m], w[m]) if m > k else (_ZERO, _ZERO, _ZERO)
            for s in range(len(a)):
                a[s] = a[s] + u0 * x[s] + u1 * y[s]
                b[s] = b[s] + v0 * x[s] + v1 * y[s]
                c[s] = c[s] + w0 * x[s] + w1 * y[s]


@kernel
def correlate(
    lines: Floats, temporal: Floats, norms: Floats, least: Any, start: int, stop: int, n_before: int, scores: Floats, out: Floats
) -> bool:
    """Sum a unit's projections, each weighed by its temporal factor around every column of [start, stop).

    Where no score can be `least` they are left 0, and that is told: an inner product is at most the product of the norms, and the
    first factor is most of a filter. The scores on either side of one that large are right, too.
    """
    n_samples, first, end = temporal.shape[1], start - 1, whole_vectors(start - 1, stop + 1)
    rest, total = _ZERO, out[: end - first]
    for r in range(1, len(temporal)):
        rest += norms[r] * np.sqrt(energy_of(lines[r, first - n_before : stop - n_before + n_samples]))
    possible = rest + norms[0] * np.sqrt(energy_of(lines[0, first - n_before : stop - n_before + n_samples])) >= least
    if possible:
        total[:] = _ZERO
        convolve(lines[0, first - n_before : end - n_before + n_samples - 1], temporal[0], total)
        possible = False
        for i in range(len(total)):
            possible |= total[i] >= least - rest
    if not possible:
        scores[start:stop] = _ZERO
        return False
    for r in range(1, len(temporal)):
        convolve(lines[r, first - n_before : end - n_before + n_samples - 1], temporal[r], total)
    scores[first:end] = total
    return True


@reduction
def energy_of(line: Floats) -> np.float32:
    """Sum the squares."""
    total = _ZERO
    for s in range(len(line)):
        total += line[s] * line[s]
    return total


@kernel
def mark(scores: Floats, least: np.float32, start: int, stop: int, tall: Any) -> int:
    """Mark the columns of [start, stop) with a score of more than `least`; return the one after the last of them, or 0."""
    until = 0
    for s in range(start, stop):
        if scores[s] > least:
            tall[s], until = True, s + 1
    return until


@kernel
def whole_vectors(start: int, stop: int) -> int:
    """Return where [start, stop) ends if it is made a multiple of 8 long: single columns at its end cost as much as all others.

    What is there belongs to samples yet to come, and is not looked at before they are.
    """
    return start + (stop - start + 7) // 8 * 8


@kernel
def convolve(line: Floats, taps: Floats, out: Floats) -> None:
    """Add to `out` the inner products of `taps` with `line` from each sample on; eight taps at a time spare stores."""
    j = 0
    while j + 8 <= len(taps):
        x, w = line[j : j + len(out) + 7], taps[j : j + 8]
        w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        for s in range(len(out)):
            early = (w0 * x[s] + w1 * x[s + 1]) + (w2 * x[s + 2] + w3 * x[s + 3])
            out[s] += early + ((w4 * x[s + 4] + w5 * x[s + 5]) + (w6 * x[s + 6] + w7 * x[s + 7]))
        j += 8
    while j < len(taps):
        weight, x = taps[j], line[j : j + len(out)]
        for s in range(len(out)):
            out[s] += weight * x[s]
        j += 1


@kernel
def peel(window: Tuple, t: Tuple, threshold: Floats, first: int, stop: int, computed: int, n_found: int, spans: Tuple) -> int:
    """Decide the columns [first, stop) one after the other; return how many spikes are found now, `n_found` having been before.

    At each column the unit that gains most, above its threshold and above all rivals within `spans.sweep` columns, is subtracted,
    and the last `spans.look_back` columns are looked at again, and as many before it, until nothing is found or `spans.rounds` are
    over. Where something larger seems to come, of which a spike may be a part, the decision is deferred until that is subtracted,
    or for `spans.patience` columns. Scores are known up to column `computed`. The spikes go to `window.found`, `window.amplitude`,
    `window.gain` and `window.runner_up`; `window.through` is left at the column before which none is found any more.
    """
    for s in range(first, stop):
        late = s - spans.patience
        look_from, reach = window.through[0] if window.deferred[late] else s, s - spans.look_back
        for _ in range(spans.rounds):
            if not window.tall[look_from : s + 1].any():
                break
            u, column, gain = best_spike(window, t, threshold, look_from, reach, s, spans)
            if u < 0:
                break
            other = runner_up(window, t, u, column, spans)
            u, column, lead = take_apart(window, t, threshold, u, column, s, spans)
            if lead > _ZERO:
                gain = gain_of(window.scores[u, column], t.energy[u], t.tightness[u])
                other = gain - lead
            window.runner_up[n_found] = other
            accept(window, t, u, column, gain, n_found, spans)
            low = max(column - t.temporal.shape[2] + 1, window.through[0] - spans.sweep - 1)
            high = min(column + t.shifted.shape[2], computed)
            score(window, t, t.rivals[u], column - spans.n_before, low, high, spans.n_before)
            n_found += 1
            reach = min(reach, column - spans.look_back)
            look_from = window.through[0]
        window.deferred[late] = False
        move_through(window.through, window.deferred, s, spans.look_back)
    return n_found


@kernel
def move_through(through: Any, deferred: Any, now: int, look_back: int) -> None:
    """Move `through` on to `look_back` columns before what is not decided at `now`; it has never gone further."""
    column = through[0]
    while column + look_back <= now and not (deferred[column] or deferred[column + look_back]):
        column += 1
    through[0] = column


@kernel
def best_spike(window: Tuple, t: Tuple, threshold: Floats, first: int, reach: int, now: int, spans: Tuple) -> tuple[int, int, Any]:
    """Find the unit and the column within [first, now] of largest gain that no rival beats; unit -1 if there is none.

    Of columns before `reach`, those count that are deferred.
    """
    best, best_column, best_gain = -1, -1, _ZERO
    for u in range(len(t.energy)):
        if window.until[u] <= first:
            continue
        for c in range(first, now + 1):
            if c < reach and not window.deferred[c]:
                continue
            y = window.scores[u, c]
            if y <= _TOO_SMALL * t.energy[u] or y > _TOO_LARGE * t.energy[u] or abs(c - window.last[u]) < spans.refractory:
                continue
            before, after = window.scores[u, c - 1], window.scores[u, c + 1]
            if before > y or after > y:
                continue
            gain = gain_of(between(before, y, after), t.energy[u], t.tightness[u])
            if gain <= threshold[u] or gain <= best_gain:
                continue
            certain = gain - spans.tolerance * misfit(window, t, u, c)
            if (
                certain <= threshold[u]
                or certain <= best_gain
                or tired(window, u, c, spans)
                or not wins(window, t, u, c, gain, spans)
            ):
                continue
            if premature(window, t, u, c, now, spans):
                window.deferred[c] |= now - c < spans.patience
                continue
            best, best_column, best_gain = u, c, certain
    return best, best_column, best_gain


@kernel
def take_apart(
    window: Tuple, t: Tuple, threshold: Floats, u: int, column: int, now: int, spans: Tuple
) -> tuple[int, int, np.float32]:
    """Tell whether a large spike is two at once; return unit and column of the larger of them, and by how much two gain more.

    Any two rivals within `spans.apart` columns count, up to what is known at column `now`. The scores of the larger one around its
    column are left as they would be without the other. If it is one spike, that is returned, with 0.
    """
    y = window.scores[u, column]
    v, c, w, d, b, lead = u, column, u, column, _ZERO, _ZERO
    if amplitude_of(y, t.energy[u], t.tightness[u]) < _SUM:
        return v, c, lead
    one = gain_of(y, t.energy[u], t.tightness[u])
    low, high = max(column - spans.apart, window.through[0]), min(column + spans.apart, now + spans.sweep)
    for large in t.rivals[u]:
        for small in t.rivals[u]:
            if min(large, small) < 0 or large == small or t.energy[small] > t.energy[large]:
                continue
            at, other_at, a, two = best_two(window, t, large, small, low, high, spans)
            if two - threshold[small] - one > lead:
                v, c, w, d, b, lead = large, at, small, other_at, a, two - threshold[small] - one
    if lead > _ZERO:
        see(window, t, v, w, 2 * spans.apart)
        for i in range(c - 1, c + 2):
            window.scores[v, i] -= b * window.seen[i - d + 2 * spans.apart]
    return v, c, lead


@kernel
def best_two(window: Tuple, t: Tuple, v: int, w: int, low: int, high: int, spans: Tuple) -> tuple[int, int, np.float32, np.float32]:
    """Find where in [low, high] a spike of each of two units gain most together: both columns, the second's amplitude, the gain."""
    best_c, best_d, amplitude, most = low, low, _ZERO, _ZERO
    least_y, least_z = _LEAST * t.energy[v], _LEAST * t.energy[w]
    if window.scores[v, low : high + 1].max() < least_y or window.scores[w, low : high + 1].max() < least_z:
        return best_c, best_d, amplitude, most
    see(window, t, v, w, 2 * spans.apart)
    e, f = t.energy[v] + t.tightness[v], t.energy[w] + t.tightness[w]
    for c in range(low, high + 1):
        for d in range(low, high + 1):
            y, z, shared = window.scores[v, c], window.scores[w, d], window.seen[c - d + 2 * spans.apart]
            if y < least_y or z < least_z:
                continue
            y, z, det = y + t.tightness[v], z + t.tightness[w], e * f - shared * shared
            a, b = (f * y - shared * z) / det, (e * z - shared * y) / det
            gain = a * y + b * z - (t.tightness[v] + t.tightness[w])
            usual = min(a, b) >= _LEAST and max(a, b) <= _MOST
            if gain > most and usual and not tired(window, v, c, spans) and not tired(window, w, d, spans):
                best_c, best_d, amplitude, most = c, d, b, gain
    return best_c, best_d, amplitude, most


@kernel
def see(window: Tuple, t: Tuple, u: int, v: int, n: int) -> None:
    """Score a spike of unit `v` with the filter of unit `u` from `n` columns before the spike to `n` after it: `window.seen`."""
    n_line, middle = t.temporal.shape[2] + 2 * n, t.shifted.shape[1] // 2
    out, line = window.seen[: 2 * n + 1], window.scratch[:n_line]
    out[:] = _ZERO
    for r in range(t.spatial.shape[1]):
        line[:] = _ZERO
        for k in range(t.channels.shape[1]):
            c = t.channels[u, k]
            if c < 0:
                break
            if t.place[v, c] >= 0:
                weight, x = t.spatial[u, r, k], t.shifted[v, middle, :, t.place[v, c]]
                for j in range(n, n_line):
                    line[j] += weight * x[j - n]
        convolve(line, t.temporal[u, r], out)


@kernel
def tired(window: Tuple, u: int, column: int, spans: Tuple) -> bool:
    """Tell whether a unit fired within its refractory time of a column."""
    fired = False
    for i in range(len(window.recent)):
        fired |= window.recent[i, 0] == u and abs(column - window.recent[i, 1]) < spans.refractory
    return fired


@kernel
def premature(window: Tuple, t: Tuple, u: int, column: int, now: int, spans: Tuple) -> bool:
    """Tell whether a spike seems to be a part of something larger, in what is known at column `now`.

    It is if it leaves something larger than itself on its largest channels; or, while the decision can wait, if it leaves a good
    part of a rival of more energy on that one's largest channel.
    """
    shift = shift_of(window.scores[u], column, t.response[u])
    a = amplitude_of(window.scores[u, column] * t.energy[u] / t.response[u, shift, 1], t.energy[u], t.tightness[u])
    n = now + t.filters.shape[1] + spans.sweep - column
    for k in range(min(_CORE, t.channels.shape[1])):
        c = t.channels[u, k]
        if c >= 0 and most_left(window, t, u, column, shift, a, c, n, spans) > a * t.height[u] + _LARGER_BY:
            return True
    if now - column >= spans.patience:
        return False
    for v in t.rivals[u]:
        if v < 0:
            break
        coming = most_left(window, t, u, column, shift, a, t.channels[v, 0], n, spans) if t.energy[v] > t.energy[u] else _ZERO
        if coming > _HERALD * t.height[v]:
            return True
    return False


@kernel
def most_left(window: Tuple, t: Tuple, u: int, column: int, shift: int, a: Any, channel: int, n: int, spans: Tuple) -> np.float32:
    """Return the largest of `n` samples, from those of the spike on, that a spike would leave on a channel."""
    most, first, k = _ZERO, column - spans.n_before, t.place[u, channel]
    for j in range(n):
        left = window.residual[channel, first + j]
        if k >= 0 and j < t.shifted.shape[2]:
            left -= a * t.shifted[u, shift, j, k]
        most = max(most, abs(left))
    return most


@kernel
def amplitude_of(score: np.float32, energy: np.float32, tightness: np.float32) -> np.float32:
    """Return the amplitude of largest gain."""
    return min(max((score + tightness) / (energy + tightness), _LEAST), _MOST)


@kernel
def gain_of(score: np.float32, energy: np.float32, tightness: np.float32) -> np.float32:
    """Return by how much the best amplitude lowers the whitened residual energy; one far from 1 costs `tightness` by its square."""
    a = amplitude_of(score, energy, tightness)
    gain: np.float32 = _TWO * a * score - a * a * energy - tightness * (a - _ONE) * (a - _ONE)
    return gain


@kernel
def between(before: np.float32, here: np.float32, after: np.float32) -> np.float32:
    """Return the height of the parabola through three scores if it peaks in the middle, else the middle one."""
    bend = before - _TWO * here + after
    if bend >= _ZERO or before > here or after > here:
        return here
    return here - np.float32(0.125) * (before - after) * (before - after) / bend


@kernel
def wins(window: Tuple, t: Tuple, u: int, column: int, gain: np.float32, spans: Tuple) -> bool:
    """Tell whether no rival, and not the unit itself, gains more within `spans.sweep` columns."""
    for v in t.rivals[u]:
        if v < 0:
            break
        for c in range(column - spans.sweep, column + spans.sweep + 1):
            y = window.scores[v, c]
            if (
                y <= _TOO_SMALL * t.energy[v]
                or y > _TOO_LARGE * t.energy[v]
                or abs(c - window.last[v]) < spans.refractory
                or (v == u and c == column)
            ):
                continue
            if gain_of(y, t.energy[v], t.tightness[v]) > gain:
                return False
    return True


@kernel
def runner_up(window: Tuple, t: Tuple, u: int, column: int, spans: Tuple) -> np.float32:
    """Return the largest gain of any other unit at this spike, 0 if none gains."""
    best = _ZERO
    for v in t.rivals[u]:
        if v < 0:
            break
        if v == u:
            continue
        for c in range(column - spans.sweep // 2, column + spans.sweep // 2 + 1):
            y = window.scores[v, c]
            if y > _TOO_SMALL * t.energy[v] and y <= _TOO_LARGE * t.energy[v]:
                best = max(best, gain_of(y, t.energy[v], t.tightness[v]))
    return best


@kernel
def misfit(window: Tuple, t: Tuple, u: int, column: int) -> np.float32:
    """Return what the spikes subtracted nearby had added to this score: no spike is quite its template, so a part of it is left."""
    total = _ZERO
    n_samples, n_whole = t.filters.shape[1], t.shifted.shape[2]
    for i in range(len(window.recent)):
        other, lag = window.recent[i, 0], column - window.recent[i, 1]
        if other < 0 or lag <= -n_samples or lag >= n_whole:
            continue
        product = _ZERO
        for k in range(t.channels.shape[1]):
            c = t.channels[u, k]
            if c < 0:
                break
            m = t.place[other, c]
            if m < 0:
                continue
            for j in range(max(-lag, 0), min(n_whole - lag, n_samples)):
                product += t.filters[u, j, k] * t.shifted[other, window.recent[i, 2], j + lag, m]
        total += abs(product) * window.recent_amplitude[i]
    return total


@kernel
def shift_of(scores: Floats, column: int, response: Floats) -> int:
    """Return the row of `response` most like the scores around a column."""
    best, least = 0, np.float32(np.inf)
    for i in range(len(response)):
        a = scores[column] / response[i, 1]
        early, late = scores[column - 1] - a * response[i, 0], scores[column + 1] - a * response[i, 2]
        if early * early + late * late < least:
            best, least = i, early * early + late * late
    return best


@kernel
def accept(window: Tuple, t: Tuple, u: int, column: int, gain: np.float32, row: int, spans: Tuple) -> None:
    """Subtract a spike from the residual and note it, at row `row` of what was found and first among the recent ones."""
    shift = shift_of(window.scores[u], column, t.response[u])
    y = window.scores[u, column] * t.energy[u] / t.response[u, shift, 1]
    a = amplitude_of(y, t.energy[u], t.tightness[u])
    for k in range(t.channels.shape[1]):
        c = t.channels[u, k]
        if c < 0:
            break
        for j in range(t.shifted.shape[2]):
            window.residual[c, column - spans.n_before + j] -= np.rint(a * t.shifted[u, shift, j, k] * STEPS) / STEPS
    collision = 0
    for i in range(len(window.recent)):
        if window.recent[i, 0] >= 0 and abs(window.recent[i, 1] - column) < spans.overlap:
            for v in t.rivals[u]:
                collision |= v == window.recent[i, 0]
    for i in range(len(window.recent) - 1, 0, -1):
        for j in range(3):
            window.recent[i, j] = window.recent[i - 1, j]
        window.recent_amplitude[i] = window.recent_amplitude[i - 1]
    window.recent[0, 0], window.recent[0, 1], window.recent[0, 2] = u, column, shift
    window.recent_amplitude[0] = a
    window.last[u] = max(window.last[u], column)
    window.found[row, 0], window.found[row, 1], window.found[row, 2], window.found[row, 3] = u, column, shift, collision
    window.amplitude[row], window.gain[row] = a, gain


@kernel
def clean_snippets(residual: Floats, t: Tuple, first: Any, row: Any, amplitude: Floats, snippets: Floats) -> None:
    """Cut the residual from columns `first` on, where each spike's unit is known, and put its own template back, unshifted."""
    middle = t.shifted.shape[1] // 2
    for i in range(len(first)):
        around = t.around[row[i]]
        for k in range(len(around)):
            line = residual[around[k], first[i] : first[i] + snippets.shape[2]]
            for j in range(snippets.shape[2]):
                snippets[i, k, j] = line[j]
        for k in range(t.channels.shape[1]):
            c = t.channels[row[i], k]
            if c < 0:
                break
            line = snippets[i, np.searchsorted(around, c)]
            for j in range(snippets.shape[2]):
                line[j] += amplitude[i] * t.shifted[row[i], middle, j, k]
