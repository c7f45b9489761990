//go:build darwin || dragonfly || freebsd || illumos || linux || netbsd || openbsd

package main

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

// TestLockErrors blames another process only if there is one.
func TestLockErrors(t *testing.T) {
	for _, err := range []error{syscall.ENOSYS, syscall.ENOLCK, syscall.ENOTSUP, syscall.EWOULDBLOCK} {
		got := lockError(err)
		locked := strings.Contains(got.Error(), "in use by another process")
		if locked != (err == syscall.EWOULDBLOCK) || errors.Is(got, err) == locked {
			t.Errorf("%v: got the error %v", err, got)
		}
	}
}
