"""Write the demo's data, byte for byte the packaged file: `python -m onebase.demo.make_data [--output PATH]`.

Every row is invented here from the tables below; no customer wrote any of it, and each row says so. The
label follows from the text alone: the template gives the intent, the noun the product, a letter with four
digits the order, a clause from `URGENT` the urgency. A template meets a product at most once, so a held-out
row is always a pair that training has not seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from onebase.demo import read_demo
from onebase.files import write_text

SEED = 7
TEMPLATES_A_PRODUCT = 8  # of the twelve an intent has; 6 intents x 10 products x 8 = 480 rows
HAS_ORDER, IS_URGENT = 0.67, 0.5

PRODUCTS = (
    *("kettle", "toaster", "blender", "lamp", "heater"),
    *("camera", "keyboard", "printer", "radio", "vacuum"),
)

# {item}: the product, often with an adjective; {when}: a past date; {street}, {city}: a place.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "refund": (
        "I bought a {item} {when} and it disappoints me, so I would like my money back, please.",
        "The {item} that I got {when} is not as described. Please return the full amount to my card.",
        "I sent the {item} back {when}, but the money has still not reached my bank account.",
        "Could you refund me for the {item}? I bought it {when} and have never taken it out of the box.",
        "We already owned a {item}, so we returned ours {when} and are waiting for the refund.",
        "I was charged twice for one {item} {when}. Please pay the second charge back to me.",
        "The {item} broke after a single use, and I do not want a new one. Please just reimburse me.",
        "How do I get my money back for a {item} that I bought {when} and no longer want?",
        "I am not happy with the {item} at all. I returned it {when} and expect to be reimbursed.",
        "You promised {when} to refund the price of my {item}, yet nothing has shown up on my statement.",
        "Neither a repair nor another {item} will help me. I want back what I paid {when}.",
        "The shop lists my {item} as returned {when}. Please tell me when I will be paid back.",
    ),
    "exchange": (
        "The {item} that came {when} is the wrong size. Can I swap it for another model?",
        "I received a {item} {when}, but the colour is wrong. Please send me the right one in exchange.",
        "Could I exchange the {item} that I bought {when} for the next larger model in your range?",
        "My {item} arrived {when} with a crack in the case. I want no refund, only a replacement.",
        "I would like to trade my {item} for the newer version and will gladly pay the difference.",
        "The {item} does not fit in our room. May I hand it in and get a smaller one instead?",
        "The {item} that you delivered {when} is scratched. Please replace it with a flawless one.",
        "The box held a used {item}. Please swap it for a new one that nobody has opened.",
        "I picked the wrong {item} {when} and it is still sealed. How do I switch it for another type?",
        "Please send a replacement for my {item}. A part was missing when I unpacked it {when}.",
        "Keep my money, but take this {item} and give me the same one in another colour, please.",
        "A friend gave me a {item} {when}. It is lovely, but may I exchange it for a bigger one?",
    ),
    "repair": (
        "My {item} stopped working {when}, and it is still under warranty. Can you fix it for me?",
        "The {item} that I bought {when} makes a loud noise. I would like a technician to mend it.",
        "A button on my {item} came off {when}. Where can I send it to have it mended?",
        "I do not want another {item}, I want mine fixed. It has been dead since it fell {when}.",
        "Please book a repair for my {item}. The cable has been loose since it fell off the table {when}.",
        "The {item} turns itself off after a minute. Which workshop near {city} can repair it?",
        "How much does it cost to have a {item} repaired if the warranty ran out {when}?",
        "Smoke came out of my {item} {when}. Please have your workshop find the fault and fix it.",
        "Do you have a spare part for the {item}? Its switch broke {when}, and it needs mending.",
        "I sent my {item} to your workshop {when}. Has the technician been able to fix it yet?",
        "The light on my {item} flickers, and I would rather have it repaired than throw it away.",
        "Your technician mended my {item} {when}, but the fault is back and needs another repair.",
    ),
    "tracking": (
        "I ordered a {item} {when} and it has not arrived. Can you tell me where the parcel is?",
        "The tracking page for my {item} has not changed since {city}. Where is the parcel now?",
        "When will the {item} that I ordered {when} be delivered? I have heard nothing from the courier.",
        "The courier claims to have delivered my {item} {when}, but nobody here has seen the package.",
        "Could you send me the tracking link for the {item}? The email with it never reached me.",
        "My {item} was shipped {when}, they said. On which day can I expect it in {city}?",
        "I am still waiting for the {item} that I paid for {when}. Has the parcel left your warehouse?",
        "Has my {item} been sent out? The website has said that it is being packed for days.",
        "I missed the courier {when}. Can you find out which depot is holding the {item} for me?",
        "Please look up where my {item} is. It should have reached us in {city} days ago.",
        "Two of my three parcels arrived {when}, but the one with the {item} is nowhere to be seen.",
        "What is the delivery status of the {item}? I ordered it {when} as a gift for my sister.",
    ),
    "cancel": (
        "I ordered a {item} {when} by mistake. Please cancel the order before it leaves your warehouse.",
        "Please stop the order of the {item} that I placed {when}; I have found one nearby.",
        "I have changed my mind about the {item}. Can I still cancel it if it has not been shipped?",
        "My son ordered a {item} {when} without asking me. Please call the order off and ship nothing.",
        "Do not send the {item}, please. I ordered it {when} and my plans are different now.",
        "I clicked twice {when} and now have two orders for one {item}. Please cancel the second one.",
        "How can I withdraw my order for a {item}? The website no longer shows me a cancel button.",
        "The {item} that I ordered {when} is still being packed, so kindly cancel it for me.",
        "I want to call off my purchase of a {item}, as somebody gave me one {when}.",
        "Since the {item} will come too late for us, we wish to cancel what we ordered {when}.",
        "Is it too late to cancel? I ordered a {item} {when} and it has not been sent yet.",
        "Please take the {item} off my order list; I no longer need the one I ordered {when}.",
    ),
    "address": (
        "I have moved to {city}. Please send the {item} that I ordered {when} to {street} instead.",
        "I gave you the wrong house number for the {item}. The right delivery address is {street}, {city}.",
        "Could the {item} go to my office? The address there is {street}, {city}, not my home.",
        "Please change the delivery address of my {item} to {street}, since nobody is at home in {city}.",
        "My {item} is on its way to our old flat. Can it be sent on to {street}?",
        "When I ordered the {item} {when} I mistyped the street. It has to be {street}, please.",
        "Please deliver the {item} to my neighbour at {street}, because I will be away in {city}.",
        "How do I change where the {item} is delivered? I would like it to go to {street}.",
        "The {item} is a present, so please ship it to my mother at {street} and not to me.",
        "Your website still has my old address for the {item}. We live at {street}, {city} now.",
        "I ordered a {item} {when}, but the address is out of date. Please use {street}, {city}.",
        "We are between two flats, so the {item} should be delivered to {street} in {city} instead.",
    ),
}

ORDER = (
    *("My order number is {order}.", "The order is {order}.", "It was order {order}.", "Order {order}."),
    *("You will find it under {order}.", "Reference: {order}.", "The invoice says {order}."),
    "I am customer {customer} and the order is {order}.",
    "Order number {order}, paid by card.",
)
NO_ORDER = (
    *("", "", "I cannot find the order number.", "The order number got lost."),
    *("I have no order number.", "I no longer have the invoice.", "I am customer {customer}."),
)
URGENT = (
    *("This is urgent.", "It is rather urgent.", "Please hurry.", "Please act immediately."),
    *("I need this settled right away.", "Please do it as soon as possible.", "This is an emergency."),
)
CALM = (
    *("", "", "", "", "There is no rush.", "Please take your time.", "This is not urgent."),
    *("There is no need to hurry.", "It can wait until next week.", "An answer next month is fine."),
)
OPENERS = (
    *("", "", "", "", "", "Hello!", "Hi!", "Hi there!", "Good morning!", "Hello again."),
    *("Dear support team!", "My name is {name}.", "This is {name}."),
)
CLOSERS = (
    *("", "", "", "", "", "Thanks!", "Thank you!", "Many thanks!"),
    *("Thank you, {name}", "Best, {name}", "Regards, {name}", "Cheers, {name}"),
)

ADJECTIVES = ("", "", "", "black ", "white ", "red ", "green ", "small ", "large ", "cheap ")
DATES = (
    "last {day}",
    "on {day}",
    "on {month} {number}",
    "on {number} {month}",
    "in {month}",
    "{number} days ago",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "September", "October", "November")
STREETS = ("Elm Street", "Mill Lane", "Park Road", "Station Road", "King Street", "Lake Avenue", "Hill Drive")
CITIES = ("Leeds", "Bristol", "Dublin", "Boston", "Denver", "Oslo", "Vienna", "Lisbon", "Toronto", "Perth")
NAMES = (
    *("Maria", "Tom", "Aisha", "Lukas", "Chloe", "Omar", "Ines", "Peter", "Yuki", "Rosa", "Daniel", "Nadia"),
    *("Ben", "Elif", "Hugo", "Grace", "Ivan", "Priya", "Karl", "Wanda", "Sean", "Lena", "Mateo", "Ruth"),
)


def _fields(rng: random.Random, product: str) -> dict[str, str]:
    """A random value for each name that a template may mention."""
    date = rng.choice(DATES).format(
        day=rng.choice(DAYS), month=rng.choice(MONTHS), number=rng.randrange(2, 29)
    )
    return {
        "item": rng.choice(ADJECTIVES) + product,
        "when": date,
        "street": f"{rng.randrange(1, 200)} {rng.choice(STREETS)}",
        "city": rng.choice(CITIES),
        "name": rng.choice(NAMES),
        "customer": str(rng.randrange(10_000, 100_000)),
        "order": f"{rng.choice('ABCDEFGH')}{rng.randrange(1000, 10_000)}",
    }


def _row(rng: random.Random, intent: str, template: str, product: str) -> dict[str, str | bool]:
    fields = _fields(rng, product)
    has_order, urgent = rng.random() < HAS_ORDER, rng.random() < IS_URGENT
    middle = [template, rng.choice(ORDER if has_order else NO_ORDER), rng.choice(URGENT if urgent else CALM)]
    rng.shuffle(middle)
    parts = [rng.choice(OPENERS), *middle, rng.choice(CLOSERS)]
    order = fields["order"] if has_order else None
    label = {"intent": intent, "product": product, "order": order, "urgent": urgent}
    return {
        "prompt": " ".join(part for part in parts if part).format(**fields),
        "completion": json.dumps(label, separators=(",", ":")),
        "synthetic": True,
    }


def make_rows(seed: int = SEED) -> list[dict[str, str | bool]]:
    """480 rows, 80 for each intent and 48 for each product, in a seeded random order."""
    rng = random.Random(seed)
    rows = [
        _row(rng, intent, template, product)
        for intent, templates in TEMPLATES.items()
        for product in PRODUCTS
        for template in rng.sample(templates, TEMPLATES_A_PRODUCT)
    ]
    rng.shuffle(rows)
    return rows


def render(rows: Sequence[dict[str, str | bool]]) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file; without `--output`, the packaged one."""
    parser = argparse.ArgumentParser(description="Write the demo's synthetic support messages.")
    parser.add_argument("--output", type=Path, default=read_demo(), help="file to write (JSON lines)")
    write_text(parser.parse_args(arguments).output, render(make_rows()))


if __name__ == "__main__":
    main()
