"""Watch two columns of a table for drift: weekly histograms, their KL from the first weeks, and a limit for the noise.

Half a year of made-up orders: amounts grow by 2 % per week from week 16 on, and weeks 11 to 14 have a voucher campaign.
Each week is compared with the first eight, over bins that these define. A week of n orders and a reference of N orders
over k bins differ by chance: 2 KL / (1/n + 1/N) is then about chi-squared with k - 1 degrees of freedom (the G test),
which gives the limit.

Run it with ``make examples``, or (seconds)::

    pip install "klcore[examples]"
    python examples/drift.py
"""

import numpy as np
import pandas as pd
from scipy.stats import chi2
from style import figure, head, save

import klcore

WEEKS, REFERENCE, BINS = 26, 8, 10  # weeks in all, and those of the reference; bins of the amount
RATE = 0.001  # of false alarms, per week and column
DRIFT, CAMPAIGN = 16, (11, 12, 13, 14)  # weeks
STORES = ["Aachen", "Bonn", "Celle", "Dresden", "Essen", "Fulda"]
PAYMENTS = ["card", "cash", "transfer", "voucher"]


def orders(seed=0):
    """A table of week, store, amount and payment; stores differ in what their customers buy, and how they pay."""
    rng = np.random.default_rng(seed)
    week = np.repeat(np.arange(WEEKS), rng.integers(400, 1600, WEEKS))
    store = rng.integers(0, len(STORES), len(week))
    growth = 0.02 * np.maximum(week - DRIFT + 1, 0)
    amount = rng.lognormal(3.3 + 0.1 * (store % 3) + growth, 0.6).round(2)
    vouchers = np.where(np.isin(week, CAMPAIGN), 0.05, 0.01)
    cash = 0.15 + 0.3 * (store >= 4)
    shares = np.stack([0.8 - cash, cash, 0.2 - vouchers, vouchers], -1)
    payment = (rng.random((len(week), 1)) > shares.cumsum(-1)).sum(-1)
    return pd.DataFrame(
        {"week": week, "store": np.take(STORES, store), "amount": amount, "payment": np.take(PAYMENTS, payment)}
    )


def edges(values, bins=BINS):
    """Of bins with equal shares of these values; the outer two are open."""
    inner = np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])
    return np.concatenate([[-np.inf], np.unique(inner), [np.inf]])


def histograms(table):
    """Counts of each week, by column: arrays of shape (weeks, bins). And the bounds of the bins of the amount."""
    bounds = edges(table.amount[table.week < REFERENCE])
    bins = {"amount": pd.cut(table.amount, bounds, labels=False), "payment": table.payment}
    return {name: pd.crosstab(table.week, of).to_numpy() for name, of in bins.items()}, bounds


def watch(counts):
    """KL of each week from the reference in nats, what chance makes of it on average, and the limit."""
    reference = counts[:REFERENCE].sum(0)
    kl = klcore.kl_div(counts, reference, space="counts")
    noise = (1 / counts.sum(-1) + 1 / reference.sum()) / 2
    freedom = counts.shape[-1] - 1
    return kl, noise * freedom, noise * chi2.ppf(1 - RATE, freedom)


def draw_weeks(counts, theme):
    """KL by week, with the band in which chance keeps it."""
    picture = figure(5.8)
    panels = picture.subplots(len(counts), 1, sharex=True)
    for panel, (name, of) in zip(panels, counts.items(), strict=True):
        kl, noise, limit = watch(of)
        weeks = np.arange(REFERENCE, WEEKS)
        kl, noise, limit = (1000 * a[REFERENCE:] for a in (kl, noise, limit))
        panel.fill_between(weeks, limit, color=theme["grey"], alpha=0.35, linewidth=0, label="chance")
        panel.plot(weeks, noise, color=theme["ink"], linestyle="--", linewidth=1.2, label="mean of chance")
        panel.plot(weeks, kl, color=theme["blue"], marker="o", linewidth=2, label="KL(week || reference)")
        alarm = kl > limit
        panel.plot(
            weeks[alarm], kl[alarm], color=theme["orange"], marker="D", markersize=8, linestyle="", label="alarm"
        )
        panel.set(title=f"{name}, thousandths of a nat", ylim=(0, 1.1 * max(kl.max(), limit.max())))
    panels[-1].set(xlabel="week", xticks=range(REFERENCE, WEEKS, 2))
    handles, _ = panels[0].get_legend_handles_labels()
    head(picture, "Drift is what exceeds the noise of a week's sample", handles, 4)
    return picture


def draw_bins(counts, bounds, theme):
    """The amounts of the reference and of the last four weeks, and what each bin adds to the divergence."""
    reference, current = counts[:REFERENCE].sum(0), counts[-4:].sum(0)
    terms = klcore.kl_div(current, reference, space="counts", base=2, reduction="none")
    picture = figure(5.8)
    above, below = picture.subplots(2, 1, sharex=True)
    place, width = np.arange(len(reference)), 0.4
    above.bar(place - width / 2, 100 * reference / reference.sum(), width, color=theme["grey"], label="first 8 weeks")
    above.bar(place + width / 2, 100 * current / current.sum(), width, color=theme["blue"], label="last 4 weeks")
    above.set(title="share of orders, %")
    above.legend(loc="upper left", ncols=2)
    above.set_ylim(0, 1.25 * above.get_ylim()[1])
    below.bar(place, 1000 * terms, 0.8, color=theme["orange"])
    below.set(title="what each bin adds to the KL, thousandths of a bit", xlabel="amount, up to")
    below.set_xticks(place, [f"{b:.0f}" for b in bounds[1:-1]] + ["more"])
    for panel in (above, below):
        panel.grid(visible=False, axis="x")
    head(picture, f"The largest orders make up {terms[-1] / terms.sum():.0%} of the divergence")
    return picture


def main():
    counts, bounds = histograms(orders())
    for name, of in counts.items():
        kl, noise, limit = watch(of)
        print(f"{name}: {of.shape[1]} bins\n{'week':>4}{'orders':>8}{'KL, nats':>10}{'by chance':>11}{'limit':>9}")
        for week in range(REFERENCE, WEEKS):
            alarm = "  alarm" if kl[week] > limit[week] else ""
            print(f"{week:>4}{of[week].sum():>8}{kl[week]:>10.4f}{noise[week]:>11.4f}{limit[week]:>9.4f}{alarm}")
    save("drift_bins", lambda theme: draw_bins(counts["amount"], bounds, theme))
    save("drift_weeks", lambda theme: draw_weeks(counts, theme))


if __name__ == "__main__":
    main()
