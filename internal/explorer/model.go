// Package explorer owns the full-screen look at an image's layers and files: `conex image explore`.
//
// It is a model and a view over what package analyze found, driven by bubbletea: keys go in, a screen comes out, nothing else happens. Names
// from images reach the screen through analyze.Printable alone, so no file can move the cursor. The program around it is cmd/conex-explore,
// since the terminal library's initialisation costs more than a whole `conex version` may grow.
package explorer

import (
	"fmt"
	"strings"

	tea "charm.land/bubbletea/v2"

	"conex/internal/analyze"
)

// pane is the part of the screen that has the keys.
type pane int

const (
	layersPane pane = iota
	filesPane
)

// Model is the explorer's state.
type Model struct {
	img   *analyze.Image
	root  *item
	style style

	width, height int
	focus         pane
	layer         int  // the one that is shown
	layerTop      int  // the first on the screen
	alone         bool // the layer's own changes only
	pass          filter
	wasted        bool // the list of wasted files instead of the tree
	help          bool

	rows  []*item
	files cursor
	waste cursor

	searching bool   // keys go to the query
	query     string // the last one
	matches   []*item
	match     int
	message   string // until the next key
}

// cursor is the chosen line of a list and the first one on the screen.
type cursor struct{ at, top int }

// move puts the cursor to a line of n, and the screen, of height lines, to where it shows.
func (c *cursor) move(at, n, height int) {
	c.at = max(0, min(at, n-1))
	c.top = max(0, min(c.top, n-height))
	c.top = max(c.at-height+1, min(c.top, c.at))
}

// New returns the explorer of an image. color allows colours; letters say the same.
func New(img *analyze.Image, color bool) *Model {
	m := &Model{img: img, root: newItems(img.Root(), nil), style: style{color}, pass: everything, layer: max(0, len(img.Layers)-1)}
	m.root.open = true
	m.showLayer(m.layer)
	return m
}

// Init does nothing: all is there.
func (m *Model) Init() tea.Cmd { return nil }

// Update takes a key or a new size.
func (m *Model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
		m.settle()
	case tea.KeyPressMsg:
		return m, m.key(msg)
	case tea.PasteMsg:
		if m.searching {
			m.query += msg.Content
		}
	}
	return m, nil
}

func (m *Model) key(k tea.KeyPressMsg) tea.Cmd {
	m.message = ""
	name := k.String()
	switch {
	case name == "ctrl+c":
		return tea.Quit
	case name == "ctrl+z":
		return tea.Suspend
	case m.searching:
		m.typed(k)
		return nil
	case m.help:
		m.help = false
		return nil
	}
	switch name {
	case "q":
		return tea.Quit
	case "?":
		m.help = true
	case "tab", "shift+tab":
		m.focus = filesPane - m.focus
	case "/":
		m.searching, m.query, m.wasted, m.focus = true, "", false, filesPane
	case "n":
		m.next(1)
	case "N":
		m.next(-1)
	case "esc":
		m.matches, m.wasted = nil, false
	case "w":
		m.wasted, m.focus = !m.wasted, filesPane
	case "t":
		m.alone = !m.alone
		m.showLayer(m.layer)
	case "u":
		m.toggle(analyze.Unchanged)
	case "a":
		m.toggle(analyze.Added)
	case "c":
		m.toggle(analyze.Changed)
	case "d":
		m.toggle(analyze.Removed)
	case "e":
		m.root.unfold(true)
		m.list()
	case "E":
		m.root.fold(true)
		m.list()
	case "[":
		m.showLayer(m.layer - 1)
	case "]":
		m.showLayer(m.layer + 1)
	case "up", "k", "ctrl+p":
		m.move(-1)
	case "down", "j", "ctrl+n":
		m.move(1)
	case "pgup", "ctrl+b":
		m.move(-m.page())
	case "pgdown", "ctrl+f":
		m.move(m.page())
	case "ctrl+u":
		m.move(-m.page() / 2)
	case "ctrl+d":
		m.move(m.page() / 2)
	case "home", "g":
		m.move(-1 << 30)
	case "end", "G":
		m.move(1 << 30)
	case "left", "h":
		m.left()
	case "right", "l":
		m.right()
	case "enter", "space":
		m.enter()
	}
	return nil
}

// showLayer makes the screen show a layer. The file that was chosen stays so if it is there.
func (m *Model) showLayer(layer int) {
	m.layer = max(0, min(layer, len(m.img.Layers)-1))
	m.root.refresh(m.layer, m.alone, m.pass, map[inode]bool{})
	m.root.fold(false)
	if m.layer < len(m.img.Layers) {
		if l := m.img.Layers[m.layer]; l.Added+l.Changed+l.Removed <= autoOpen {
			m.root.unfold(false)
		}
	}
	m.matches = nil
	m.list()
}

func (m *Model) toggle(c analyze.Change) {
	m.pass ^= only(c)
	m.root.refresh(m.layer, m.alone, m.pass, map[inode]bool{})
	m.matches = nil
	m.list()
}

// list computes the rows anew and keeps the cursor on its item, or on the nearest folder above it that is still there.
func (m *Model) list() {
	chosen := m.chosen()
	m.rows = m.root.rows(m.rows[:0])
	for ; chosen != nil; chosen = chosen.parent {
		if i := m.index(chosen); i >= 0 {
			m.files.at = i
			break
		}
	}
	m.settle()
}

// chosen is the item under the cursor, nil for none.
func (m *Model) chosen() *item {
	if m.files.at >= len(m.rows) {
		return nil
	}
	return m.rows[m.files.at]
}

func (m *Model) index(it *item) int {
	for i, r := range m.rows {
		if r == it {
			return i
		}
	}
	return -1
}

// settle brings the cursors back into their lists and onto the screen.
func (m *Model) settle() {
	m.files.move(m.files.at, len(m.rows), m.listHeight())
	m.waste.move(m.waste.at, len(m.img.Waste), m.listHeight())
	c := cursor{m.layer, m.layerTop}
	c.move(m.layer, len(m.img.Layers), m.layersHeight())
	m.layerTop = c.top
}

func (m *Model) page() int {
	if m.focus == layersPane {
		return max(1, m.layersHeight()-1)
	}
	return max(1, m.listHeight()-1)
}

func (m *Model) move(by int) {
	switch {
	case m.focus == layersPane:
		if next := max(0, min(m.layer+by, len(m.img.Layers)-1)); next != m.layer {
			m.showLayer(next)
		}
	case m.wasted:
		m.waste.move(m.waste.at+by, len(m.img.Waste), m.listHeight())
	default:
		m.files.move(m.files.at+by, len(m.rows), m.listHeight())
	}
}

// left folds the folder, or goes to the one that the item is in.
func (m *Model) left() {
	it := m.chosen()
	switch {
	case m.focus == layersPane || m.wasted:
		m.focus = layersPane
	case it == nil:
	case it.open && it.foldable():
		m.fold(it, false)
	case it.parent != m.root:
		m.files.move(m.index(it.parent), len(m.rows), m.listHeight())
	default:
		m.focus = layersPane
	}
}

// right unfolds the folder, or goes to the first item in it.
func (m *Model) right() {
	it := m.chosen()
	switch {
	case m.focus == layersPane:
		m.focus = filesPane
	case m.wasted || it == nil || !it.foldable():
	case !it.open:
		m.fold(it, true)
	default:
		m.move(1)
	}
}

func (m *Model) enter() {
	switch it := m.chosen(); {
	case m.focus == layersPane:
		m.focus = filesPane
	case m.wasted:
		m.visitWaste()
	case it != nil && it.foldable():
		m.fold(it, !it.open)
	}
}

func (m *Model) fold(it *item, open bool) {
	it.open, it.auto = open, false
	m.list()
}

// visitWaste shows a wasted file in the tree, at the layer that has its first copy.
func (m *Model) visitWaste() {
	if m.waste.at >= len(m.img.Waste) {
		return
	}
	w := m.img.Waste[m.waste.at]
	m.wasted, m.alone, m.pass = false, false, everything
	m.showLayer(w.Layers[0])
	m.goTo(m.root.find(w.Path))
}

// goTo puts the cursor on an item.
func (m *Model) goTo(it *item) {
	if it == nil || !it.shown {
		return
	}
	it.reveal()
	m.list()
	m.files.move(m.index(it), len(m.rows), m.listHeight())
}

// typed takes a key of the query.
func (m *Model) typed(k tea.KeyPressMsg) {
	switch k.String() {
	case "esc":
		m.searching, m.query = false, ""
	case "enter":
		m.searching = false
		m.search()
	case "backspace":
		if r := []rune(m.query); len(r) > 0 {
			m.query = string(r[:len(r)-1])
		} else {
			m.searching = false
		}
	case "ctrl+u":
		m.query = ""
	default:
		m.query += k.Text
	}
}

// search finds what has the query in its name, or with a slash in the query in its path; case does not count. It goes to the first find
// behind the cursor.
func (m *Model) search() {
	q := strings.ToLower(m.query)
	m.matches, m.match = nil, -1
	if q == "" {
		return
	}
	at := m.chosen()
	passed := at == nil
	m.root.each("", func(it *item, path string) bool {
		where := path
		if !strings.Contains(q, "/") {
			where = path[strings.LastIndexByte(path, '/')+1:]
		}
		if strings.Contains(strings.ToLower(where), q) {
			m.matches = append(m.matches, it)
			if passed && m.match < 0 {
				m.match = len(m.matches) - 1
			}
		}
		passed = passed || it == at
		return true
	})
	if len(m.matches) == 0 {
		m.message = "nothing has " + analyze.Printable(m.query) + " in its name here"
		return
	}
	m.match = max(m.match, 0)
	m.showMatch()
}

// next goes to another find.
func (m *Model) next(by int) {
	if len(m.matches) == 0 {
		if m.query != "" {
			m.search()
		}
		return
	}
	m.wasted, m.focus = false, filesPane
	m.match = (m.match + by + len(m.matches)) % len(m.matches)
	m.showMatch()
}

func (m *Model) showMatch() {
	m.goTo(m.matches[m.match])
	m.message = fmt.Sprintf("%s: %d of %d", analyze.Printable(m.query), m.match+1, len(m.matches))
}
