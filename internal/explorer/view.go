package explorer

import (
	"fmt"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/docker/go-units"

	"conex/internal/analyze"
)

// The smallest screen, and how many lines the details below the two lists take.
const (
	minWidth, minHeight = 40, 12
	layerLines          = 9
	fileLines           = 5
)

func (m *Model) leftWidth() int    { return max(18, min(60, m.width*2/5)) }
func (m *Model) layersHeight() int { return max(1, m.height-3-m.layerDetails()) } // a headline, titles, a line of help
func (m *Model) listHeight() int   { return max(1, m.height-3-m.fileDetails()) }

// On a low screen the lists come first.
func (m *Model) layerDetails() int { return min(layerLines, max(0, m.height-9)) }
func (m *Model) fileDetails() int  { return min(fileLines, max(0, m.height-9)) }

// View is the screen.
func (m *Model) View() tea.View {
	v := tea.NewView(m.Screen())
	v.AltScreen = true
	return v
}

// Screen is the screen's text: as many lines as the terminal has, none wider than it.
func (m *Model) Screen() string {
	switch {
	case m.width == 0 || m.height == 0:
		return ""
	case m.width < minWidth || m.height < minHeight:
		return fit(fmt.Sprintf("too small: %dx%d at least", minWidth, minHeight), m.width)
	case m.help:
		return m.helpScreen()
	}
	left, right := m.layersView(m.leftWidth()), m.rightView(m.width-m.leftWidth()-1)
	lines := []string{m.headline()}
	for i := range m.height - 2 {
		lines = append(lines, left[i]+m.style.with(dim, "│")+right[i])
	}
	return strings.Join(append(lines, m.footer()), "\n")
}

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// percent rounds down, so that 100% means all.
func percent(x float64) string {
	p := float64(int64(x*1e3+1e-9)) / 10
	if p == 100 {
		return "100%"
	}
	return fmt.Sprintf("%.1f%%", p)
}

func (m *Model) headline() string {
	name := m.img.ID.Encoded()[:12]
	if len(m.img.Tags) > 0 {
		name = m.img.Tags[0]
	}
	s := fmt.Sprintf(" %s  %s  efficiency %s", analyze.Printable(name), size(m.img.Size), percent(m.img.Efficiency()))
	if m.img.Wasted > 0 {
		s += fmt.Sprintf("  %s wasted", size(m.img.Wasted))
	}
	return m.style.with(reverse, fit(s, m.width))
}

func (m *Model) footer() string {
	switch {
	case m.searching:
		q := analyze.Printable(m.query)
		if w := m.width - 3; len([]rune(q)) > w {
			q = string([]rune(q)[len([]rune(q))-w:])
		}
		return fit("/"+q+"_", m.width)
	case m.message != "":
		return fit(" "+m.message, m.width)
	}
	return m.style.with(dim, fit(" ?:help tab:side enter:fold /:search t:layer alone uacd:filter w:wasted q:quit", m.width))
}

// title is the line above a list; that of the side with the keys stands out.
func (m *Model) title(text string, width int, focus bool) string {
	if focus {
		return m.style.with(bold, fit("▌"+text, width))
	}
	return fit(" "+text, width)
}

// row draws a line of a list.
func (m *Model) row(text string, width int, chosen, focus bool, c analyze.Change) string {
	mark := " "
	if chosen {
		mark = ">"
	}
	text = fit(mark+text, width)
	if chosen && focus {
		return m.style.with(reverse, text)
	}
	return m.style.change(c, text)
}

// pad fills lines up to n.
func pad(lines []string, n, width int) []string {
	for len(lines) < n {
		lines = append(lines, fit("", width))
	}
	return lines[:n]
}

func (m *Model) layersView(width int) []string {
	focus := m.focus == layersPane
	lines := []string{m.title(fmt.Sprintf("Layers%6s %6s", "size", "score"), width, focus)}
	for i := m.layerTop; i < min(len(m.img.Layers), m.layerTop+m.layersHeight()); i++ {
		l := &m.img.Layers[i]
		score := 1.0
		if l.Size > 0 {
			score = 1 - float64(l.Wasted)/float64(l.Size)
		}
		lines = append(lines, m.row(fmt.Sprintf("%3d %8s %6s %s", i, size(l.Size), percent(score), made(l)), width, i == m.layer, focus, analyze.Unchanged))
	}
	lines = pad(lines, 1+m.layersHeight(), width)
	return pad(append(lines, m.layerDetail(width)...), m.height-2, width)
}

// made is the instruction that made a layer.
func made(l *analyze.Layer) string {
	if s := analyze.Instruction(l.CreatedBy); s != "" {
		return s
	}
	if s := analyze.Line(l.Comment); s != "" {
		return s
	}
	return "(not in the history)"
}

// rule is a line with a title in it.
func (m *Model) rule(text string, width int) string {
	text = "─ " + text + " "
	return m.style.with(dim, fit(text+strings.Repeat("─", max(0, width-len([]rune(text)))), width))
}

func (m *Model) layerDetail(width int) []string {
	if len(m.img.Layers) == 0 {
		return nil
	}
	l := &m.img.Layers[m.layer]
	lines := []string{m.rule(fmt.Sprintf("layer %d  %s", m.layer, l.DiffID.Encoded()[:12]), width)}
	about := wrap(fmt.Sprintf("%s, %s wasted, hides %s", size(l.Size), size(l.Wasted), size(l.Hides)), width, 2)
	about = append(about, wrap(fmt.Sprintf("%d added, %d changed, %d removed", l.Added, l.Changed, l.Removed), width, 2)...)
	if len(l.SharedWith) > 0 {
		about = append(about, wrap("shared with "+strings.Join(l.SharedWith, ", "), width, 2)...)
	} else {
		about = append(about, fit("shared with no other image", width))
	}
	lines = append(lines, wrap(made(l), width, layerLines-1-len(about))...)
	return append(lines, about...)
}

func (m *Model) rightView(width int) []string {
	if m.wasted {
		return m.wasteView(width)
	}
	focus := m.focus == filesPane
	what := "Image at layer"
	if m.alone {
		what = "Changes of layer"
	}
	title := fmt.Sprintf("%s %d  %s", what, m.layer, size(m.root.size))
	if hidden := m.hidden(); hidden != "" {
		title += "  without " + hidden
	}
	lines := []string{m.title(title, width, focus)}
	for i := m.files.top; i < min(len(m.rows), m.files.top+m.listHeight()); i++ {
		it := m.rows[i]
		lines = append(lines, m.row(line(it, width), width, i == m.files.at, focus, it.change))
	}
	if len(m.rows) == 0 {
		lines = append(lines, fit("   nothing", width))
	}
	lines = pad(lines, 1+m.listHeight(), width)
	return pad(append(lines, m.fileDetail(width)...), m.height-2, width)
}

func (m *Model) hidden() string {
	var words []string
	for c := analyze.Unchanged; c <= analyze.Removed; c++ {
		if !m.pass.has(c) {
			words = append(words, c.String())
		}
	}
	return strings.Join(words, ", ")
}

// line is an item's row: the change's letter (* for a folder with changes in it), size, name.
func line(it *item, width int) string {
	letter := string(it.change.Letter())
	if it.change == analyze.Unchanged && it.below != 0 {
		letter = "*"
	}
	fold := "  "
	if it.foldable() {
		fold = "▸ "
		if it.open {
			fold = "▾ "
		}
	}
	name := analyze.Printable(it.node.Name())
	switch {
	case it.state.IsDir():
		name += "/"
	case it.state.Target != "":
		name += " -> " + analyze.Printable(it.state.Target)
	}
	indent := min(2*it.depth(), max(0, width-10)/3) // deep folders would push their names out of the screen
	return fmt.Sprintf("%s %7s %s%s%s", letter, size(it.size), strings.Repeat(" ", indent), fold, name)
}

func (m *Model) fileDetail(width int) []string {
	it := m.chosen()
	if it == nil {
		return []string{m.rule("", width)}
	}
	s := it.state
	lines := []string{m.rule("details", width)}
	lines = append(lines, wrap("/"+analyze.Printable(it.node.Path()), width, 2)...)
	about := fmt.Sprintf("%s %d:%d ", s.ModeString(), s.UID, s.GID)
	switch {
	case s.IsRegular():
		about += fmt.Sprintf("%d bytes ", s.Size)
	case s.Type() == "char" || s.Type() == "block":
		about += fmt.Sprintf("device %d:%d ", s.Major, s.Minor)
	}
	about += time.Unix(0, s.ModTime).UTC().Format("2006-01-02 15:04:05")
	extra := past(it.node)
	if first := s.FirstName(); first != nil && s.Links() > 1 {
		extra = fmt.Sprintf("%d hard links, one is /%s; %s", s.Links(), analyze.Printable(first.Path()), extra)
	}
	if s.Target != "" {
		extra = "-> " + analyze.Printable(s.Target) + "; " + extra
	}
	for _, x := range s.Xattrs {
		extra += "; " + analyze.Printable(x.Name)
	}
	lines = append(lines, fit(about, width))
	return append(lines, wrap(extra, width, fileLines-len(lines))...)
}

// past tells what the layers did to a path.
func past(n *analyze.Node) string {
	var words []string
	for _, s := range n.States() {
		words = append(words, fmt.Sprintf("%s in %d", n.Change(s.Layer), s.Layer))
	}
	return "layers: " + strings.Join(words, ", ")
}

func (m *Model) wasteView(width int) []string {
	focus := m.focus == filesPane
	files := "files"
	if len(m.img.Waste) == 1 {
		files = "file"
	}
	lines := []string{m.title(fmt.Sprintf("Wasted  %s in %d %s", size(m.img.Wasted), len(m.img.Waste), files), width, focus)}
	for i := m.waste.top; i < min(len(m.img.Waste), m.waste.top+m.listHeight()); i++ {
		w := &m.img.Waste[i]
		c := analyze.Changed
		if w.Deleted {
			c = analyze.Removed
		}
		lines = append(lines, m.row(fmt.Sprintf("%c %7s %3dx /%s", c.Letter(), size(w.Bytes), w.Copies, analyze.Printable(w.Path)), width, i == m.waste.at, focus, c))
	}
	if len(m.img.Waste) == 0 {
		lines = append(lines, fit("   nothing", width))
	}
	lines = pad(lines, 1+m.listHeight(), width)
	lines = append(lines, m.rule("details", width))
	if m.waste.at < len(m.img.Waste) {
		w := &m.img.Waste[m.waste.at]
		end := "a later copy shows"
		if w.Deleted {
			end = "deleted in the end"
		}
		lines = append(lines, wrap("/"+analyze.Printable(w.Path), width, 2)...)
		lines = append(lines, wrap(fmt.Sprintf("%d bytes in layers %s; %s; enter goes there", w.Bytes, strings.Trim(fmt.Sprint(w.Layers), "[]"), end), width, 2)...)
	}
	return pad(lines, m.height-2, width)
}

// helpText is shorter than the smallest common screen.
const helpText = `
 tab            layers or files
 up down j k    move; PgUp PgDn, Ctrl-U Ctrl-D, Home End, g G
 left h         fold, or to the folder above
 right l        unfold, or into the folder
 enter space    fold or unfold
 e E            unfold all, fold all
 [ ]            layer before, layer after
 t              whole tree, or what the layer changed
 u a c d        show or hide: unchanged, added, changed, removed
 / n N          search a name (with a / in it: a path), next, previous
 w              files with wasted bytes; enter shows one in the tree
 esc            back
 q Ctrl-C       quit

 A added  C changed  D removed  * a folder with changes in it
 score: the share of a layer's bytes that the image shows in the end
 wasted: bytes that a later layer overwrites or deletes
 hides: bytes of lower layers that this one wastes`

func (m *Model) helpScreen() string {
	lines := []string{m.headline()}
	for l := range strings.SplitSeq(strings.TrimPrefix(helpText, "\n"), "\n") {
		lines = append(lines, fit(l, m.width))
	}
	lines = pad(lines, m.height-1, m.width)
	return strings.Join(append(lines, m.style.with(dim, fit(" any key goes back", m.width))), "\n")
}
