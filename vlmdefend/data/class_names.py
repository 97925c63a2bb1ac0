"""Class names that torchvision does not give in words, in the wording that CLIP's paper published.

Names come as text blocks split at ``;`` so that a list of a hundred names stays a few lines.
"""

from __future__ import annotations

import importlib
from functools import cache


def _listed(block: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in block.replace("\n", " ").split(";"))


def underscores(name: str) -> str:
    """Turns a folder name into words: ``apple_pie`` to ``apple pie``, ``field/outdoor`` to ``field outdoor``."""
    return " ".join(name.replace("_", " ").replace("/", " ").split())


@cache
def imagenet_names() -> dict[str, str]:
    """Returns WordNet id to readable name of the 1,000 ImageNet classes, in the order of their labels.

    The ids come from timm, the names (OpenAI's list as open_clip keeps it, in the order of the sorted ids) from
    open_clip.
    """
    wnids = importlib.import_module("timm.data").ImageNetInfo().label_names()
    names = importlib.import_module("open_clip.zero_shot_metadata").IMAGENET_CLASSNAMES
    return dict(zip(wnids, names, strict=True))


DIGITS = tuple("0123456789")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PCAM = ("lymph node", "lymph node containing metastatic tumor tissue")

EUROSAT: dict[str, str] = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "highway or road",
    "Industrial": "industrial buildings or commercial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings or homes or apartments",
    "River": "river",
    "SeaLake": "lake or sea",
}
"""Folder name -> name in CLIP's prompts."""

CALTECH101: dict[str, str] = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "yin_yang": "yin and yang symbol",
}
"""The folders of Caltech-101 whose name is not simply the folder's words (CLIP's wording)."""

FLOWERS102 = _listed(
    """
pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily;
moon orchid; bird of paradise; monkshood; globe thistle; snapdragon; colt's foot; king protea;
spear thistle; yellow iris; globe flower; purple coneflower; peruvian lily; balloon flower;
giant white arum lily; fire lily; pincushion flower; fritillary; red ginger; grape hyacinth; corn poppy;
prince of wales feathers; stemless gentian; artichoke; sweet william; carnation; garden phlox;
love in the mist; mexican aster; alpine sea holly; ruby-lipped cattleya; cape flower; great masterwort;
siam tulip; lenten rose; barbeton daisy; daffodil; sword lily; poinsettia; bolero deep blue; wallflower;
marigold; buttercup; oxeye daisy; common dandelion; petunia; wild pansy; primula; sunflower; pelargonium;
bishop of llandaff; gaura; geranium; orange dahlia; pink and yellow dahlia; cautleya spicata;
japanese anemone; black-eyed susan; silverbush; californian poppy; osteospermum; spring crocus;
bearded iris; windflower; tree poppy; gazania; azalea; water lily; rose; thorn apple; morning glory;
passion flower; lotus; toad lily; anthurium; frangipani; clematis; hibiscus; columbine; desert-rose;
tree mallow; magnolia; cyclamen; watercress; canna lily; hippeastrum; bee balm; air plant; foxglove;
bougainvillea; camellia; mallow; mexican petunia; bromelia; blanket flower; trumpet creeper;
blackberry lily
"""
)
"""By label (1 to 102 in the set's own files, less one)."""

GTSRB = _listed(
    """
red and white circle 20 kph speed limit; red and white circle 30 kph speed limit;
red and white circle 50 kph speed limit; red and white circle 60 kph speed limit;
red and white circle 70 kph speed limit; red and white circle 80 kph speed limit;
end / de-restriction of 80 kph speed limit; red and white circle 100 kph speed limit;
red and white circle 120 kph speed limit; red and white circle red car and black car no passing;
red and white circle red truck and black car no passing;
red and white triangle road intersection warning; white and yellow diamond priority road;
red and white upside down triangle yield right-of-way; stop; empty red and white circle;
red and white circle no truck entry; red circle with white horizonal stripe no entry;
red and white triangle with exclamation mark warning;
red and white triangle with black left curve approaching warning;
red and white triangle with black right curve approaching warning;
red and white triangle with black double curve approaching warning;
red and white triangle rough / bumpy road warning;
red and white triangle car skidding / slipping warning;
red and white triangle with merging / narrow lanes warning;
red and white triangle with person digging / construction / road work warning;
red and white triangle with traffic light approaching warning;
red and white triangle with person walking warning;
red and white triangle with child and person walking warning; red and white triangle with bicyle warning;
red and white triangle with snowflake / ice warning; red and white triangle with deer warning;
white circle with gray strike bar no speed limit; blue circle with white right turn arrow mandatory;
blue circle with white left turn arrow mandatory; blue circle with white forward arrow mandatory;
blue circle with white forward or right turn arrow mandatory;
blue circle with white forward or left turn arrow mandatory;
blue circle with white keep right arrow mandatory; blue circle with white keep left arrow mandatory;
blue circle with white arrows indicating a traffic circle;
white circle with gray strike bar indicating no passing for cars has ended;
white circle with gray strike bar indicating no passing for trucks has ended
"""
)
"""By label; the spelling is CLIP's own (``horizonal``, ``bicyle``), because the prompt is part of the number."""

COUNTRY211 = dict(
    entry.split("=", 1)
    for entry in _listed(
        """
AD=Andorra; AE=United Arab Emirates; AF=Afghanistan; AG=Antigua and Barbuda; AI=Anguilla; AL=Albania;
AM=Armenia; AO=Angola; AQ=Antarctica; AR=Argentina; AT=Austria; AU=Australia; AW=Aruba; AX=Aland Islands;
AZ=Azerbaijan; BA=Bosnia and Herzegovina; BB=Barbados; BD=Bangladesh; BE=Belgium; BF=Burkina Faso;
BG=Bulgaria; BH=Bahrain; BJ=Benin; BM=Bermuda; BN=Brunei Darussalam; BO=Bolivia;
BQ=Bonaire, Saint Eustatius and Saba; BR=Brazil; BS=Bahamas; BT=Bhutan; BW=Botswana; BY=Belarus;
BZ=Belize; CA=Canada; CD=DR Congo; CF=Central African Republic; CH=Switzerland; CI=Cote d'Ivoire;
CK=Cook Islands; CL=Chile; CM=Cameroon; CN=China; CO=Colombia; CR=Costa Rica; CU=Cuba; CV=Cabo Verde;
CW=Curacao; CY=Cyprus; CZ=Czech Republic; DE=Germany; DK=Denmark; DM=Dominica; DO=Dominican Republic;
DZ=Algeria; EC=Ecuador; EE=Estonia; EG=Egypt; ES=Spain; ET=Ethiopia; FI=Finland; FJ=Fiji;
FK=Falkland Islands; FO=Faeroe Islands; FR=France; GA=Gabon; GB=United Kingdom; GD=Grenada; GE=Georgia;
GF=French Guiana; GG=Guernsey; GH=Ghana; GI=Gibraltar; GL=Greenland; GM=Gambia; GP=Guadeloupe; GR=Greece;
GS=South Georgia and South Sandwich Is.; GT=Guatemala; GU=Guam; GY=Guyana; HK=Hong Kong; HN=Honduras;
HR=Croatia; HT=Haiti; HU=Hungary; ID=Indonesia; IE=Ireland; IL=Israel; IM=Isle of Man; IN=India; IQ=Iraq;
IR=Iran; IS=Iceland; IT=Italy; JE=Jersey; JM=Jamaica; JO=Jordan; JP=Japan; KE=Kenya; KG=Kyrgyz Republic;
KH=Cambodia; KN=St. Kitts and Nevis; KP=North Korea; KR=South Korea; KW=Kuwait; KY=Cayman Islands;
KZ=Kazakhstan; LA=Laos; LB=Lebanon; LC=St. Lucia; LI=Liechtenstein; LK=Sri Lanka; LR=Liberia;
LT=Lithuania; LU=Luxembourg; LV=Latvia; LY=Libya; MA=Morocco; MC=Monaco; MD=Moldova; ME=Montenegro;
MF=Saint-Martin; MG=Madagascar; MK=Macedonia; ML=Mali; MM=Myanmar; MN=Mongolia; MO=Macau; MQ=Martinique;
MR=Mauritania; MT=Malta; MU=Mauritius; MV=Maldives; MW=Malawi; MX=Mexico; MY=Malaysia; MZ=Mozambique;
NA=Namibia; NC=New Caledonia; NG=Nigeria; NI=Nicaragua; NL=Netherlands; NO=Norway; NP=Nepal;
NZ=New Zealand; OM=Oman; PA=Panama; PE=Peru; PF=French Polynesia; PG=Papua New Guinea; PH=Philippines;
PK=Pakistan; PL=Poland; PR=Puerto Rico; PS=Palestine; PT=Portugal; PW=Palau; PY=Paraguay; QA=Qatar;
RE=Reunion; RO=Romania; RS=Serbia; RU=Russia; RW=Rwanda; SA=Saudi Arabia; SB=Solomon Islands;
SC=Seychelles; SD=Sudan; SE=Sweden; SG=Singapore; SH=St. Helena; SI=Slovenia;
SJ=Svalbard and Jan Mayen Islands; SK=Slovakia; SL=Sierra Leone; SM=San Marino; SN=Senegal; SO=Somalia;
SS=South Sudan; SV=El Salvador; SX=Sint Maarten; SY=Syria; SZ=Eswatini; TG=Togo; TH=Thailand;
TJ=Tajikistan; TL=Timor-Leste; TM=Turkmenistan; TN=Tunisia; TO=Tonga; TR=Turkey; TT=Trinidad and Tobago;
TW=Taiwan; TZ=Tanzania; UA=Ukraine; UG=Uganda; US=United States; UY=Uruguay; UZ=Uzbekistan; VA=Vatican;
VE=Venezuela; VG=British Virgin Islands; VI=United States Virgin Islands; VN=Vietnam; VU=Vanuatu;
WS=Samoa; XK=Kosovo; YE=Yemen; ZA=South Africa; ZM=Zambia; ZW=Zimbabwe
"""
    )
)
"""ISO 3166 code (the folder name) -> country."""
