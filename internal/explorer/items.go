package explorer

import (
	"strings"

	"conex/internal/analyze"
)

// item is a path in the tree on the screen: what the current layer shows of it, and whether it is unfolded.
type item struct {
	node     *analyze.Node
	parent   *item
	children []*item
	// open folders show what is in them; auto ones were opened for a layer's changes and are closed with it.
	open, auto bool

	// Set by view.refresh.
	state  *analyze.State // nil: not there
	change analyze.Change
	size   int64  // of the file, or of all in the folder
	below  filter // the changes in the folder, itself not counted
	shown  bool   // passes the filters, or something in it does
}

// filter is a set of changes.
type filter uint8

func only(c analyze.Change) filter { return 1 << c }

func (f filter) has(c analyze.Change) bool { return f&only(c) != 0 }

// everything lets all pass.
const everything filter = 1<<analyze.Unchanged | 1<<analyze.Added | 1<<analyze.Changed | 1<<analyze.Removed

// touched is what a layer did something to.
const touched = everything &^ (1 << analyze.Unchanged)

// autoOpen is the highest number of a layer's changes for which the folders on the way to them are opened.
const autoOpen = 300

func newItems(n *analyze.Node, parent *item) *item {
	it := &item{node: n, parent: parent}
	if kids := n.Children(); len(kids) > 0 {
		it.children = make([]*item, len(kids))
		for i, c := range kids {
			it.children[i] = newItems(c, it)
		}
	}
	return it
}

// inode is a file of several names.
type inode struct {
	first   *analyze.Node
	layer   int
	removed bool
}

// refresh makes the items show a layer: with alone only what the layer touched, and of that what the filter lets pass. It returns what the item
// adds to its folder: a file of several names counts at the first of them, which counted knows.
func (it *item) refresh(layer int, alone bool, pass filter, counted map[inode]bool) int64 {
	n := it.node
	it.state, it.change = n.Shown(layer), n.Change(layer)
	it.size, it.below, it.shown = 0, 0, false
	if it.state == nil {
		return 0
	}
	if alone {
		pass &= touched
	}
	it.shown = pass.has(it.change)
	if !it.state.IsDir() {
		it.size = it.state.Size
		if alone && it.change == analyze.Unchanged {
			return 0
		}
		if it.state.Links() > 1 {
			key := inode{it.state.FirstName(), it.state.Layer, it.change == analyze.Removed}
			if counted[key] {
				return 0
			}
			counted[key] = true
		}
	}
	for _, c := range it.children {
		n := c.refresh(layer, alone, pass, counted)
		if c.state == nil {
			continue
		}
		it.below |= c.below
		if c.change != analyze.Unchanged {
			it.below |= only(c.change)
		}
		if c.change != analyze.Removed || it.change == analyze.Removed {
			it.size += n
		}
		it.shown = it.shown || c.shown
	}
	return it.size
}

// rows lists what is on the screen, from the top: all that is shown in open folders.
func (it *item) rows(out []*item) []*item {
	for _, c := range it.children {
		if !c.shown {
			continue
		}
		out = append(out, c)
		if c.open {
			out = c.rows(out)
		}
	}
	return out
}

// each calls fn for every shown item, folded or not, with its printable path, until it returns false.
func (it *item) each(path string, fn func(*item, string) bool) bool {
	for _, c := range it.children {
		if !c.shown {
			continue
		}
		p := path + "/" + analyze.Printable(c.node.Name())
		if !fn(c, p) || !c.each(p, fn) {
			return false
		}
	}
	return true
}

// unfold opens every folder on the way to a change, and with all every folder.
func (it *item) unfold(all bool) {
	for _, c := range it.children {
		if c.shown && len(c.children) > 0 {
			if all {
				c.open, c.auto = true, false
			} else if c.below == 0 || c.change == analyze.Added || c.change == analyze.Removed {
				continue // all of it came or went, which its own line says
			} else if !c.open {
				c.open, c.auto = true, true
			}
			c.unfold(all)
		}
	}
}

// fold closes the folders that unfold opened, and with all every folder.
func (it *item) fold(all bool) {
	for _, c := range it.children {
		if c.auto || all {
			c.open, c.auto = false, false
		}
		c.fold(all)
	}
}

// reveal opens the folders that an item is in.
func (it *item) reveal() {
	for p := it.parent; p != nil; p = p.parent {
		p.open, p.auto = true, false
	}
}

func (it *item) depth() int {
	d := 0
	for p := it.parent; p != nil && p.parent != nil; p = p.parent {
		d++
	}
	return d
}

// find returns the item of a path, nil if the image never had it.
func (it *item) find(path string) *item {
	for p := range strings.SplitSeq(path, "/") {
		var next *item
		for _, c := range it.children {
			if c.node.Name() == p {
				next = c
				break
			}
		}
		if it = next; it == nil {
			return nil
		}
	}
	return it
}

// foldable reports whether there is something to show in the item.
func (it *item) foldable() bool {
	for _, c := range it.children {
		if c.shown {
			return true
		}
	}
	return false
}
