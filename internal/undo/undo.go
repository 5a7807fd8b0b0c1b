// Package undo collects the steps that take a half-done action back.
package undo

// Stack holds undo steps, run last first. The zero value is empty and ready.
// A function registers each undo as it goes, defers Run, and calls Forget when all succeeded.
type Stack struct{ steps []func() }

// Add registers f to run before every step that was added earlier.
func (s *Stack) Add(f func()) { s.steps = append(s.steps, f) }

// Run executes the registered steps, newest first, and forgets them.
func (s *Stack) Run() {
	steps := s.steps
	s.steps = nil
	for i := len(steps) - 1; i >= 0; i-- {
		steps[i]()
	}
}

// Forget drops every step: the action is whole.
func (s *Stack) Forget() { s.steps = nil }
