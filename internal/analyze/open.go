package analyze

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"

	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/layertar"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// Store is where images and their layers are.
type Store struct {
	Images *image.Store
	Layers *layers.Store
}

// Image looks at an image. A layer that is not here is layers.ErrNotFound.
func (s Store) Image(ctx context.Context, img image.Image) (*Image, error) {
	sharers, err := s.Sharers(img)
	if err != nil {
		return nil, err
	}
	out := &Image{ID: img.ID, Tags: img.RepoTags, Created: img.Created, Config: img.Config, Platform: registry.FormatPlatform(img.Config.Platform)}
	made := Steps(img.Config)
	ids := img.Layers()
	trees := s.scan(ctx, ids)
	defer trees.stop()
	m := newMerger(out)
	for i, id := range ids {
		t, size, err := trees.next()
		if err != nil {
			return nil, fmt.Errorf("look at image %s: %w", Label(img), err)
		}
		l := Layer{DiffID: id, TarSize: size, CreatedBy: made[i].CreatedBy, Comment: made[i].Comment, SharedWith: sharers[id]}
		if made[i].Created != nil {
			l.Created = *made[i].Created
		}
		if err := m.add(l, t); err != nil {
			return nil, fmt.Errorf("look at image %s: %w", Label(img), err)
		}
	}
	m.done()
	return out, nil
}

// New puts layers together, base first, whose trees are at hand: what Image does with those of a store. Of about it takes what an image says of
// itself, of each layer the same.
func New(about Image, list []Layer, trees []*layertar.Tree) (*Image, error) {
	m := newMerger(&about)
	for i, l := range list {
		if err := m.add(l, trees[i]); err != nil {
			return nil, err
		}
	}
	m.done()
	return &about, nil
}

// Steps returns for each layer the entry of the history that made it. Layers that the history does not tell of, which is what squashing and
// hand-made images leave, have an empty one.
func Steps(c ocispec.Image) []ocispec.History {
	steps := make([]ocispec.History, len(c.RootFS.DiffIDs))
	i := 0
	for _, h := range c.History {
		if h.EmptyLayer {
			continue
		}
		if i == len(steps) {
			break
		}
		steps[i] = h
		i++
	}
	return steps
}

// Sharers returns for each layer here the images other than the given one that have it: the first tag of each, or its short id. Images of one tag
// and several platforms are told apart by these. Damaged images have no say.
func (s Store) Sharers(except image.Image) (map[ocispec.Digest][]string, error) {
	all, err := s.Images.List()
	if err != nil && !errors.Is(err, image.ErrDamaged) {
		return nil, err
	}
	out := map[ocispec.Digest][]string{}
	for _, img := range all {
		if img.ID == except.ID {
			continue
		}
		name := Label(img)
		if slices.Contains(except.RepoTags, name) {
			name += " (" + registry.FormatPlatform(img.Config.Platform) + ")"
		}
		for _, d := range img.Layers() {
			if !slices.Contains(out[d], name) {
				out[d] = append(out[d], name)
			}
		}
	}
	for _, names := range out {
		slices.Sort(names)
	}
	return out, nil
}

// Label is what to call an image in a word: its first tag, else its short id.
func Label(img image.Image) string {
	if len(img.RepoTags) > 0 {
		return img.RepoTags[0]
	}
	return img.ID.Encoded()[:12]
}

// trees are the trees of layers in order, read ahead of who takes them.
type trees struct {
	out    chan chan scanned
	cancel context.CancelFunc
	done   chan struct{}
}

type scanned struct {
	tree *layertar.Tree
	size int64
	err  error
}

// scan begins to read layers, as many at once as there are processors and four at most, since each tree takes memory until it is merged.
func (s Store) scan(ctx context.Context, ids []ocispec.Digest) *trees {
	ctx, cancel := context.WithCancel(ctx)
	// One is at next, one waits to be put into the channel, and the channel holds the others.
	t := &trees{out: make(chan chan scanned, max(0, min(4, runtime.GOMAXPROCS(0))-2)), cancel: cancel, done: make(chan struct{})}
	go func() { // ends with stop
		defer close(t.done)
		defer close(t.out)
		for _, id := range ids {
			c := make(chan scanned, 1)
			go func() {
				tree, size, err := s.tree(ctx, id)
				c <- scanned{tree, size, err}
			}()
			select {
			case t.out <- c:
			case <-ctx.Done():
				<-c
				return
			}
		}
	}()
	return t
}

// next returns the next layer's tree and the size of its tar.
func (t *trees) next() (*layertar.Tree, int64, error) {
	c, ok := <-t.out
	if !ok {
		return nil, 0, context.Canceled
	}
	r := <-c
	return r.tree, r.size, r.err
}

// stop ends all reading and waits for that.
func (t *trees) stop() {
	t.cancel()
	for c := range t.out {
		<-c
	}
	<-t.done
}

// tree reads the headers of a layer's tar.
func (s Store) tree(ctx context.Context, id ocispec.Digest) (*layertar.Tree, int64, error) {
	r, info, err := s.Layers.OpenTar(id)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	t, err := layertar.Scan(newSkipper(ctx, r, info.Size), nil)
	if err != nil {
		if errors.Is(err, layertar.ErrRefused) {
			return nil, 0, fmt.Errorf("layer %s: %w", id, err)
		}
		return nil, 0, err
	}
	return t, info.Size, nil
}

// skipper reads a tar and skips contents where the file behind it can do that.
type skipper struct {
	ctx  context.Context
	r    io.Reader
	b    *bufio.Reader
	left int64 // of the tar behind b's buffer
}

func newSkipper(ctx context.Context, r io.Reader, size int64) *skipper {
	s := &skipper{ctx: ctx, r: r, left: size}
	s.b = bufio.NewReaderSize(readerFunc(s.fill), 8<<10) // a header, a small content and the next header
	return s
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (s *skipper) fill(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := s.r.Read(p)
	s.left -= int64(n)
	return n, err
}

// Read gives the next bytes.
func (s *skipper) Read(p []byte) (int, error) { return s.b.Read(p) }

// Discard skips n bytes, or as many as there are, which is io.EOF.
func (s *skipper) Discard(n int64) (int64, error) {
	k, err := s.b.Discard(int(min(n, int64(s.b.Buffered()))))
	done := int64(k)
	if err != nil || done == n {
		return done, err
	}
	rest := min(n-done, max(0, s.left))
	var skipped int64
	switch r := s.r.(type) {
	case layertar.Discarder:
		skipped, err = r.Discard(rest)
	case io.Seeker:
		if _, err = r.Seek(rest, io.SeekCurrent); err == nil {
			skipped = rest
		}
	default:
		skipped, err = io.CopyN(io.Discard, s.r, rest)
	}
	s.left -= skipped
	done += skipped
	if err == nil && done < n {
		err = io.EOF
	}
	return done, err
}
