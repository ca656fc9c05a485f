"""Measures of generated pictures: do they follow the prompt, and do they show the concepts?"""
