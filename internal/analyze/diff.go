package analyze

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"

	"conex/internal/image"
	"conex/internal/ocispec"

	"golang.org/x/sync/errgroup"
)

// DiffOptions say what counts as a difference. The zero value compares files and configs, without times.
type DiffOptions struct {
	// Times makes the modification times of files count, and when the images were created.
	Times bool
	// NoFiles and NoConfig leave a half out.
	NoFiles, NoConfig bool
}

// Difference is how image B differs from image A.
type Difference struct {
	A, B *Image
	// Shared is the number of layers, from the base on, that are the same.
	Shared int
	Config []ConfigDifference
	Files  []FileDifference
	// Added, Changed and Removed count Files.
	Added, Changed, Removed int
}

// Equal reports whether nothing differs of what was compared.
func (d *Difference) Equal() bool { return len(d.Config)+len(d.Files) == 0 }

// ConfigDifference is a value of the config, "Cmd", "Env.PATH" or "Labels.x". One that an image has not is nil.
type ConfigDifference struct {
	Key  string
	A, B any
}

// FileDifference is a path of one image or both.
type FileDifference struct {
	Path   string
	Change Change
	// What differs, for a changed file: type, size, content, mode, owner, target, device, xattrs, time.
	What []string
	// A and B are the path in the images, nil where it is missing.
	A, B *State
}

// Diff compares two images by what a container would see: their trees and their configs, not their layers. Contents are read only of files of
// one size that do not come from the same place of the same layer.
func (s Store) Diff(ctx context.Context, a, b image.Image, opt DiffOptions) (*Difference, error) {
	d := &Difference{}
	var err error
	if d.A, err = s.Image(ctx, a); err != nil {
		return nil, err
	}
	if d.B, err = s.Image(ctx, b); err != nil {
		return nil, err
	}
	for d.Shared < min(len(d.A.Layers), len(d.B.Layers)) && d.A.Layers[d.Shared].DiffID == d.B.Layers[d.Shared].DiffID {
		d.Shared++
	}
	if !opt.NoConfig {
		if d.Config, err = diffConfigs(d.A.Config, d.B.Config, opt.Times); err != nil {
			return nil, err
		}
	}
	if opt.NoFiles || d.A.ID == d.B.ID {
		return d, nil
	}
	p := &pairs{d: d, times: opt.Times}
	p.walk(d.A.root, d.B.root, "")
	if err := p.read(ctx, s); err != nil {
		return nil, fmt.Errorf("compare %s and %s: %w", Label(a), Label(b), err)
	}
	p.finish()
	return d, nil
}

// pairs walks two trees at once.
type pairs struct {
	d     *Difference
	times bool
	// doubt are regular files of equal size, whose contents have to be read: indexes into d.Files, where they stand until that is done.
	doubt []int
	sums  map[place]*[sha256.Size]byte
}

// place is a content: a layer and the offset in its tar.
type place struct {
	layer  ocispec.Digest
	offset int64
}

func placeOf(i *Image, s *State) place { return place{i.Layers[s.Layer].DiffID, s.content.offset} }

// walk compares two folders that both images have.
func (p *pairs) walk(a, b *Node, path string) {
	i, j := 0, 0
	for i < len(a.children) || j < len(b.children) {
		var x, y *Node
		switch c := compareHeads(a.children[i:], b.children[j:]); {
		case c < 0:
			x = a.children[i]
			i++
		case c > 0:
			y = b.children[j]
			j++
		default:
			x, y = a.children[i], b.children[j]
			i++
			j++
		}
		p.pair(x, y, path)
	}
}

func compareHeads(a, b []*Node) int {
	switch {
	case len(a) == 0:
		return 1
	case len(b) == 0:
		return -1
	}
	return cmp.Compare(a[0].name, b[0].name)
}

// end is a node as the image has it in the end.
func end(i *Image, n *Node) *State {
	if n == nil {
		return nil
	}
	return n.At(len(i.Layers) - 1)
}

func (p *pairs) pair(x, y *Node, path string) {
	sa, sb := end(p.d.A, x), end(p.d.B, y)
	if sa == nil && sb == nil {
		return
	}
	n := x
	if sa == nil {
		n = y
	}
	path += "/" + n.name
	f := FileDifference{Path: path[1:], A: sa, B: sb}
	switch {
	case sa == nil:
		f.Change = Added
	case sb == nil:
		f.Change = Removed
	default:
		f.Change, f.What = Changed, p.what(sa, sb)
		if sa.IsRegular() && sb.IsRegular() && sa.Size == sb.Size && sa.Size > 0 && placeOf(p.d.A, sa) != placeOf(p.d.B, sb) {
			p.doubt = append(p.doubt, len(p.d.Files))
			p.d.Files = append(p.d.Files, f)
			return
		}
	}
	if f.Change != Changed || len(f.What) > 0 {
		p.d.Files = append(p.d.Files, f)
	}
	aDir, bDir := sa != nil && sa.IsDir(), sb != nil && sb.IsDir()
	var none Node
	switch {
	case aDir && bDir:
		p.walk(x, y, path)
	case aDir:
		p.walk(x, &none, path)
	case bDir:
		p.walk(&none, y, path)
	}
}

// what says how two files differ, contents aside.
func (p *pairs) what(a, b *State) []string {
	var w []string
	add := func(differ bool, word string) {
		if differ {
			w = append(w, word)
		}
	}
	if a.Type() != b.Type() {
		return []string{"type"}
	}
	add(a.Size != b.Size, "size")
	add(a.Mode != b.Mode, "mode")
	add(a.UID != b.UID || a.GID != b.GID, "owner")
	add(a.Target != b.Target, "target")
	add(a.Major != b.Major || a.Minor != b.Minor, "device")
	add(!slices.Equal(a.Xattrs, b.Xattrs), "xattrs")
	add(p.times && a.ModTime != b.ModTime, "time")
	return w
}

// read computes the digests of the contents in doubt, each layer in one pass.
func (p *pairs) read(ctx context.Context, s Store) error {
	p.sums = map[place]*[sha256.Size]byte{}
	byLayer := map[ocispec.Digest]map[int64]*[sha256.Size]byte{}
	for _, i := range p.doubt {
		f := &p.d.Files[i]
		for _, at := range []place{placeOf(p.d.A, f.A), placeOf(p.d.B, f.B)} {
			if p.sums[at] == nil {
				sum := new([sha256.Size]byte)
				p.sums[at] = sum
				if byLayer[at.layer] == nil {
					byLayer[at.layer] = map[int64]*[sha256.Size]byte{}
				}
				byLayer[at.layer][at.offset] = sum
			}
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for id, want := range byLayer {
		g.Go(func() error { return s.digests(ctx, id, want) })
	}
	return g.Wait()
}

// digests hashes the files of a layer whose contents begin at the offsets that are asked for.
func (s Store) digests(ctx context.Context, id ocispec.Digest, want map[int64]*[sha256.Size]byte) error {
	r, info, err := s.Layers.OpenTar(id)
	if err != nil {
		return err
	}
	defer r.Close()
	at := &position{skipper: newSkipper(ctx, r, info.Size)}
	tr := tar.NewReader(at)
	h := sha256.New()
	buf := make([]byte, 128<<10)
	for left := len(want); left > 0; {
		hdr, err := tr.Next()
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("layer %s: %w", id, err)
		}
		sum := want[at.n]
		if sum == nil || hdr.Size == 0 || hdr.Typeflag == tar.TypeLink {
			continue
		}
		h.Reset()
		if _, err := io.CopyBuffer(h, tr, buf); err != nil {
			return fmt.Errorf("layer %s: %w", id, err)
		}
		h.Sum(sum[:0])
		left--
	}
	return nil
}

// position counts what was read, and lets archive/tar skip.
type position struct {
	*skipper
	n int64
}

// Read gives the next bytes.
func (p *position) Read(b []byte) (int, error) {
	n, err := p.skipper.Read(b)
	p.n += int64(n)
	return n, err
}

// Seek skips forwards.
func (p *position) Seek(off int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || off < 0 {
		return 0, errors.New("a tar is read forwards")
	}
	n, err := p.Discard(off)
	p.n += n
	if err == io.EOF {
		err = nil // the next read meets it again
	}
	return p.n, err
}

// finish settles the doubts and counts.
func (p *pairs) finish() {
	for _, i := range p.doubt {
		f := &p.d.Files[i]
		if *p.sums[placeOf(p.d.A, f.A)] != *p.sums[placeOf(p.d.B, f.B)] {
			f.What = append([]string{"content"}, f.What...)
		}
	}
	p.d.Files = slices.DeleteFunc(p.d.Files, func(f FileDifference) bool { return f.Change == Changed && len(f.What) == 0 })
	for _, f := range p.d.Files {
		switch f.Change {
		case Added:
			p.d.Added++
		case Removed:
			p.d.Removed++
		default:
			p.d.Changed++
		}
	}
}

// diffConfigs compares what two configs say of the platform and of how to run a container. Lists that are sets (variables, labels, ports,
// volumes) are compared by entry, the others as a whole.
func diffConfigs(a, b ocispec.Image, times bool) ([]ConfigDifference, error) {
	x, err := flatten(a, times)
	if err != nil {
		return nil, err
	}
	y, err := flatten(b, times)
	if err != nil {
		return nil, err
	}
	all := maps.Clone(x)
	maps.Copy(all, y)
	var out []ConfigDifference
	for _, k := range slices.Sorted(maps.Keys(all)) {
		va, vb := x[k], y[k]
		ja, err := json.Marshal(va)
		if err != nil {
			return nil, err
		}
		jb, err := json.Marshal(vb)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(ja, jb) {
			out = append(out, ConfigDifference{k, va, vb})
		}
	}
	return out, nil
}

// flatten turns a config into values by key, in the words of its JSON. What is empty is as good as missing.
func flatten(c ocispec.Image, times bool) (map[string]any, error) {
	raw, err := json.Marshal(c.Config)
	if err != nil {
		return nil, err
	}
	var fields map[string]any
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, err
	}
	out := map[string]any{}
	for k, v := range fields {
		switch v := v.(type) {
		case map[string]any:
			if k == "Healthcheck" {
				out[k] = v
				break
			}
			for name, value := range v {
				if m, ok := value.(map[string]any); ok && len(m) == 0 {
					value = true // a set's entry
				}
				out[k+"."+name] = value
			}
		case []any:
			if len(v) == 0 {
				break
			}
			if k != "Env" {
				out[k] = v
				break
			}
			for _, e := range c.Config.Env {
				name, value, _ := strings.Cut(e, "=")
				out["Env."+name] = value
			}
		case nil:
		default:
			if v != "" && v != false {
				out[k] = v
			}
		}
	}
	for k, v := range map[string]string{"Author": c.Author, "Architecture": c.Architecture, "Variant": c.Variant, "OS": c.OS, "OSVersion": c.OSVersion} {
		if v != "" {
			out[k] = v
		}
	}
	if times && c.Created != nil {
		out["Created"] = timeOf(*c.Created)
	}
	return out, nil
}

// The JSON form of a Difference.
type (
	reportDiff struct {
		Schema       int            `json:"schema"`
		A            reportSide     `json:"a"`
		B            reportSide     `json:"b"`
		SharedLayers int            `json:"sharedLayers"`
		Equal        bool           `json:"equal"`
		Added        int            `json:"added"`
		Changed      int            `json:"changed"`
		Removed      int            `json:"removed"`
		Config       []reportConfig `json:"config"`
	}
	reportSide struct {
		reportImage
		Size   int64 `json:"size"`
		Layers int   `json:"layers"`
	}
	reportConfig struct {
		Key string `json:"key"`
		A   any    `json:"a"`
		B   any    `json:"b"`
	}
	reportFileDiff struct {
		reportPath
		Change Change       `json:"change"`
		What   []string     `json:"what,omitempty"`
		A      *reportState `json:"a,omitempty"`
		B      *reportState `json:"b,omitempty"`
	}
)

// WriteJSON writes the difference as one object: the keys of schema 1 and the list "files", sorted by path.
func (d *Difference) WriteJSON(w io.Writer) error {
	side := func(i *Image) reportSide {
		tags := i.Tags
		if tags == nil {
			tags = []string{}
		}
		return reportSide{reportImage{string(i.ID), tags, timeOf(i.Created), i.Platform}, i.Size, len(i.Layers)}
	}
	r := reportDiff{Schema: ReportSchema, A: side(d.A), B: side(d.B), SharedLayers: d.Shared, Equal: d.Equal(),
		Added: d.Added, Changed: d.Changed, Removed: d.Removed, Config: []reportConfig{}}
	for _, c := range d.Config {
		r.Config = append(r.Config, reportConfig(c))
	}
	j := newJSONWriter(w)
	j.open(r)
	j.raw(`,"files":[`)
	for k, f := range d.Files {
		if k > 0 {
			j.raw(",")
		}
		j.raw("\n")
		j.value(reportFileDiff{pathOf(f.Path), f.Change, f.What, stateOf(f.A), stateOf(f.B)})
	}
	j.raw("]}\n")
	return j.flush()
}
