package build

import (
	"context"
	"sync"
)

// tree is a set of files that lives outside of images and stages, which COPY, ADD and bind mounts read: the main context, or one that
// --build-context names. It is opened when the first step wants it, once, and belongs to the planner, which closes it.
type tree struct {
	// title is its line in the display: "[internal] load build context".
	title string
	// source makes the files available; close, which may be nil, takes back what that took.
	source func(ctx context.Context) (v *view, close func() error, err error)

	// lists is given to the view.
	lists fileLists

	once   sync.Once
	view   *view
	closer func() error
	err    error

	// The line goes from the first hash to the last.
	mu     sync.Mutex
	vertex *vertex
	left   int
}

// open returns the files. Whoever asks second waits for the first.
func (t *tree) open(ctx context.Context) (*view, error) {
	t.once.Do(func() {
		if t.view, t.closer, t.err = t.source(ctx); t.view != nil {
			t.view.lists = t.lists
		}
	})
	return t.view, t.err
}

// close frees the files.
func (t *tree) close() error {
	if t.closer == nil {
		return nil
	}
	return t.closer()
}

// expect announces a step that will read the tree.
func (t *tree) expect(j *journal) {
	t.left++
	if t.vertex == nil {
		t.vertex = j.vertex("", t.title)
	}
}

func (t *tree) begin() { t.vertex.start() }

func (t *tree) done() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.left--; t.left == 0 {
		t.vertex.end(Done, "", nil)
	}
}

// ended ends the line of a tree that a failed build did not come to, and keeps what was learned of the files.
func (t *tree) ended(err error) error {
	if t.vertex != nil && err != nil {
		t.vertex.end(Canceled, "", nil)
	}
	if t.view == nil || t.view.stats == nil {
		return nil
	}
	return t.view.stats.save()
}

// mainTree is the context of the command line, which is open already.
func mainTree(in *input) *tree {
	return &tree{title: "[internal] load build context", source: func(context.Context) (*view, func() error, error) { return &in.view, nil, nil }}
}
