package container

import (
	"math/rand/v2"
	"strconv"
	"strings"
)

// CheckName checks a name against Docker's rule, [a-zA-Z0-9][a-zA-Z0-9_.-]+, and the file system's length. The error is ErrName.
func CheckName(name string) error {
	if len(name) < 2 || len(name) > 200 {
		return &NameError{name}
	}
	for i := range len(name) {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return &NameError{name}
		}
	}
	return nil
}

// RandomName returns two words joined by an underscore, with a digit behind from the third try on, when short lists of words
// collide often.
func RandomName(try int) string {
	a, n := strings.Fields(adjectives), strings.Fields(nouns)
	name := a[rand.IntN(len(a))] + "_" + n[rand.IntN(len(n))]
	if try > 1 {
		name += strconv.Itoa(rand.IntN(10 * try))
	}
	return name
}

const adjectives = `able airy amber ample apt ashen avid azure balmy blithe bold bonny brave breezy bright brisk bronze calm candid cheery
civil clear clever coral cosy crisp curious dapper daring deft dewy eager early earnest easy elated even fair fancy fleet fond frank
fresh frosty gentle giddy glad golden grand hale handy happy hardy hazel hearty honest humble ideal indigo ivory jaunty jolly jovial keen
kind lively loyal lucid lucky lunar mellow merry mild mint misty modest mossy neat nimble noble olive open patient placid plucky polite
proud prime quick quiet rapid ready rosy royal ruby rustic sage sandy serene sharp silent silver sleek smart snowy snug solar solid
spry stable steady sturdy sunny swift tender tidy tranquil trim trusty upbeat velvet verdant vivid warm whole wise witty young zesty`

const nouns = `acorn alder anchor aspen atlas badger bamboo basin bay beacon beaver birch bison brook buoy canal canyon cedar cliff clover
comet cove crane creek crow cypress dale delta dolphin dove dune eagle elk ember falcon fern finch fjord flint forest fox gale geyser glacier
glade glen grove gull harbor hare hawk hazel heath heron hill inlet iris island ivy jay juniper kelp kestrel kite lagoon lake lantern larch
lark laurel ledge lily linden lotus lynx maple marlin marsh marten meadow mesa moor moose moss newt oak orchid oriole osprey otter owl
palm pebble pelican pine plover pond poplar prairie puffin quail quarry rapid raven reed reef ridge river robin rowan salmon sparrow
spruce stork stream summit swan thistle thrush tide trout tulip valley violet walnut willow wren yew`
