"""Common English words that the embedded tokenizer should know even where the synthetic world uses them rarely."""

from __future__ import annotations

WORDS = tuple(
    """
    a able about above across act add added after again against age ago air all allow almost along already also
    always am among amount an and animal another answer any anything appear appropriately are area arm around
    arrive as ask at away baby back bad bag bank base be bear beautiful became because become been before began
    begin behind being believe below beside best better between big bit black body both bottom box boy break
    bring brother brought build built but buy by call called came can cannot care carry case catch cause cent
    center certain chance change check child choose circle city class clean clear close cold color come common
    complete completes consider contain context continue cook cool corner correct cost could count country
    course cover create cross cut dark day dear decide deep describe describes did die difference different
    difficult dinner direction do does dog dollar done door double down draw dream drink drive drop dry during
    each early earn earth east easy eat edge eight either else empty end ending enough enter equal even evening
    ever every everyone everything exactly example expect explain eye face fact fall false family far fast
    father feel feet fell few field fight fill final find fine finish fire first fish fit five floor flower fly
    follow following food foot for force form format forward found four free fresh friend from front full
    further game garden gave general get girl give given glad glass go goal gold gone good got great green
    ground group grow guess had half hand happen happy hard has have he head hear heart heavy held help her here
    high him himself his hit hold home hope hot hour house how however hundred idea if important in inch
    information input inside instead instruction instructions into is it its job join jump just keep kept kind
    knew know known land large last late later laugh law lay lead learn least leave left length less let letter
    level lie life light like likely line list listen little live long look lost lot loud love low made main
    make man many map mark matter may me mean meant measure meet men might mile mind minute miss moment money
    month moon more morning most mother move much must my name near nearly need never new next night nine no
    none nor north not note nothing now number object of off offer often oh old on once one only open opposite
    option or order other others our out outside over own page paint pair paired paper part pass past pattern
    pay people per perhaps person picture piece place plan plant play please point poor possible price problem
    product provide provides pull purpose push put quarter question quick quiet quite rain ran rather reach read
    ready real reason receive red remain remember repeat reply request requests require response rest result
    return rich ride right river road rock room round row rule run sad safe said same sat saw say school sea
    second see seem sell sent sentence separate set seven several shall shape share she ship short should show
    side sign simple since sing sister sit six size sleep slow small snow so solution solve some someone
    something sometimes soon sort sound south space speak special spend spent spring square stand star start
    state stay step still stood stop store story street strong student study such sum summer sun sure surface
    system table take talk tall task teach tell ten test text than thank that the their them themselves then
    there these they thing think third this those though thought thousand three through time tiny to today
    together told tomorrow too took top total touch toward town travel tree trip true try turn twelve twenty
    twice two type under understand unit until up upon us use usual value very view visit voice wait walk wall
    want warm was wash watch water way we week weight well went were west what wheel when where whether which
    while white who whole whom whose why wide will wind window winter wish with within without woman wonder word
    words work world would write written wrong year years yellow yes yesterday yet you young your
    """.split()
)
"""Lower-case words, own list."""

TEMPLATE_WORDS = (
    "Below Write Instruction Response Input Answer Question Solution Option Please The Answer1 Answer2 Answer3 Answer4 "
    "Answer5 answer1 answer2 answer3 answer4 answer5 Solution1 Solution2 solution1 solution2 Option1 Option2 option1 "
    "option2 true false Human Assistant User"
).split()
"""Words of instruction templates: part of the tokenizer's training text only, never of the model's."""
